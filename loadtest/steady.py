"""Steady: users of many tenants call adapters and the base model, some far more popular than others, and think in between."""

from locust import between, task

from loadtest.users import ChatUser


class SteadyUser(ChatUser):
    """Each request is for another target."""

    wait_time = between(0.1, 1.0)

    @task
    def ask(self) -> None:
        """One request."""
        target = self.population.choose(self.chance)
        self.chat(target, f"steady {target.kind}")
