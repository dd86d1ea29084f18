"""Carries out the policy's actions, and the ways out of what it cannot do."""
