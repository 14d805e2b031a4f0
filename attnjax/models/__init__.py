"""Whole models, generation and checkpoints. Import it explicitly: `import attnjax.models`."""

from attnjax.models.sampling import Sampling as Sampling
