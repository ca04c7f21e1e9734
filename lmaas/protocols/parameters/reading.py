"""Reads the fields of a client's request by its protocol's table of parameters."""

from typing import Any

from lmaas.errors import InvalidRequest
from lmaas.protocols.parameters.checks import unsupported
from lmaas.protocols.parameters.table import Parameter, Table, Treatment


def read_model(body: dict[str, Any]) -> str:
    """Return the name of the model. Raises InvalidRequest if there is none."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest(
            "'model' must be the name of a model. GET /v1/models lists the names.", code="missing_parameter", param="model"
        )
    return model


def read_parameters(table: Table, body: dict[str, Any]) -> dict[str, Any]:
    """Return the checked values of the parameters that have an effect, in the order of the body, without `model`.

    Null means that a parameter was not given. Raises InvalidRequest with the field: for one that the table does not have, one that is
    refused, a value that is not allowed, and a required parameter that is missing.
    """
    rows = table.by_name
    given: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name == "model":
            continue
        parameter = rows.get(name)
        if parameter is None:
            raise unsupported(name)
        if parameter.treatment is Treatment.REFUSED:
            if not _is_neutral(parameter, value):
                raise unsupported(name, parameter.rule, parameter.code)
            continue
        read = parameter.read(name, value)
        if parameter.treatment is Treatment.FORWARDED and read is not None:
            given[name] = read
    for name in table.required:
        if name not in given:
            raise InvalidRequest(f"'{name}' is required. Add it to the request.", code="missing_parameter", param=name)
    return given


def _is_neutral(parameter: Parameter, value: Any) -> bool:
    # True equals 1 in Python, and is another value in JSON.
    return any(value == neutral and type(value) is type(neutral) for neutral in parameter.neutral)
