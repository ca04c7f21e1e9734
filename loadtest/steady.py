"""Steady load: users of many tenants call adapters and the base model, some far more popular than others, with pauses between requests."""

from locust import between, task

from loadtest.users import ChatUser


class SteadyUser(ChatUser):
    """A user whose requests each go to a random target."""

    wait_time = between(0.1, 1.0)

    @task
    def ask(self) -> None:
        """Send a request."""
        target = self.population.choose(self.chance)
        self.chat(target, f"steady {target.kind}")
