"""Adversarial examples: PGD, attacks by name, AutoAttack, the cheaper precision and its audit."""
