"""timm networks as RobustModel: divided into blocks, weights in arenas, exact savings."""
