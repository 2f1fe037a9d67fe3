"""Each guarantee's test notices when its mechanism is switched off; `make audit` runs the control, with the mechanism on, as well."""

import logging

import pytest
import structlog

from tests.guarantees.ground import Ground
from tests.guarantees.switches import SWITCHES, Switch, tried


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.name)
async def test_a_mechanism_switched_off_is_noticed(ground: Ground, switch: Switch) -> None:
    assert not ground.replicas  # processes of the same shop have their mechanisms still, and would do the work of those without
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        found = await tried(switch, ground.settings, off=True)
    finally:
        structlog.reset_defaults()
    assert found.violations > 0
