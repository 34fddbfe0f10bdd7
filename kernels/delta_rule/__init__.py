"""The delta rule with and without decays: a walk over chunks around one small inverse each."""
