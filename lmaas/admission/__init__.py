"""Admission: the limits of a request, an estimate of its tokens, tiers, and the errors of refusals. Limits are counted in Redis."""
