"""`lmaas doctor`: checks of a setup, each with what is wrong and what to do."""
