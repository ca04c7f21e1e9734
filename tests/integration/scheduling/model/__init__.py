"""The scheduler in plain Python, as a specification of the Lua functions. It has no Redis, and the time is an argument (`now`, ms).

It follows the comments in lmaas/scheduling/*.lua in the simplest way: where the functions keep running figures (a replica's load, the
waiting tenants, the usage of a minute), it counts anew each time. The model has one pool. It is divided as the Lua files are; each class
builds on the one before it: State, Fairness, Endings, Placement, Dispatch, Outlook, and Model (scheduler.py) with the functions themselves.
"""
