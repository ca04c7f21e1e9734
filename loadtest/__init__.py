"""Load tests: Locust users that stream chat through a running service. Each scenario is a file: `make loadtest SCENARIO=steady`."""
