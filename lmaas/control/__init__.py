"""The controller: how many replicas each pool should have, and making it so. Decisions are pure functions beside their effects."""
