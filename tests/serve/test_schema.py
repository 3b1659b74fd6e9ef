"""Requests that Schemathesis makes of the OpenAPI document: none of them is an error of the server."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from serving import live, served


@pytest.mark.slow
@pytest.mark.fault("S2")
@pytest.mark.filterwarnings("ignore")  # the tool's own
def test_no_request_of_the_document_is_an_error_of_the_server() -> None:
    with live(served(rows=4, queue=8, capacity=300)) as server:
        document = schemathesis.openapi.from_url(server.url + "/openapi.json")
        codes: dict[str, set[int]] = {}
        for found in document.get_all_operations():
            operation = found.ok()
            assert operation is not None

            @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy())
            def asked(case: Any) -> None:
                answer = case.call(timeout=60)
                assert answer.status_code < 500, answer.text
                codes.setdefault(case.operation.label, set()).add(answer.status_code)

            asked()
        assert len(codes) >= 12 and 200 in codes["POST /v1/completions"], codes
        assert server.idle()
        assert server.complete(prompt="a", max_tokens=2)["choices"]
