"""Seven forms of the policy gradient on the demo's model: ``ladder``, and what it measures with."""
