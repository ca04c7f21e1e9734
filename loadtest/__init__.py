"""Load tests: Locust users that stream chat through a running service. One file a scenario; `make loadtest SCENARIO=steady`."""
