"""timm networks as RobustModel: families, parts, weights in arenas, exact savings."""
