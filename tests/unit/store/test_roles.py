"""The passwords of the database's roles, from the settings."""

import pytest

from lmaas.errors import SettingsError
from lmaas.store.migrate import parse_passwords
from lmaas.store.rights import DatabaseRole


def test_passwords_are_read() -> None:
    assert parse_passwords("") == {}
    assert parse_passwords("gateway=a=b, controller=c") == {DatabaseRole.GATEWAY: "a=b", DatabaseRole.CONTROLLER: "c"}


@pytest.mark.parametrize("given", ["gateway", "gateway=", "=x", "owner=x", "operator=x", "gateway=a,secret"])
def test_what_is_no_password_is_refused_without_being_shown(given: str) -> None:
    with pytest.raises(SettingsError, match=r"Entry \d of LMAAS_DATABASE_PASSWORDS") as caught:
        parse_passwords(given)
    assert "secret" not in caught.value.message
