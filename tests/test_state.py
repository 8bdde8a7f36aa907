"""The app's state: one typed object, built by the lifespan, whose parts hold the same objects."""

import asyncio
from collections.abc import Callable

import pytest
from fastapi import FastAPI

from server.activity import Activity
from server.state import AppState, state_of
from tests.conftest import entered, until


class Work:
    """A workload that is switched on and off."""

    busy = False

    def is_busy(self) -> bool:
        return self.busy


def test_activity_is_what_its_workloads_are() -> None:
    work = Work()
    activity = Activity(Work(), work)
    assert (activity.is_busy(), activity.is_idle()) == (False, True)
    work.busy = True
    assert (activity.is_busy(), activity.is_idle()) == (True, False)
    work.busy, activity.replaying = False, True
    assert (activity.is_busy(), activity.is_idle()) == (False, False)  # a replay is no reason to end itself


def test_the_state_is_there_while_the_lifespan_runs(make_app: Callable[..., FastAPI]) -> None:
    async def work() -> None:
        app = make_app(shadow_precision="fp32")
        with pytest.raises(AssertionError):
            state_of(app)
        async with entered(app):
            state = state_of(app)
            assert isinstance(state, AppState)
            held = (state.pool._settings, state.service._settings, state.default.reports._settings)
            assert all(settings is state.settings for settings in held)

    asyncio.run(work())


def test_reports_and_shadow_share_the_activity_of_pool_and_service(make_app: Callable[..., FastAPI]) -> None:
    async def work() -> None:
        app = make_app(shadow_precision="fp32")
        async with entered(app):
            state = state_of(app)
            assert state.default.shadow is not None
            activity = state.default.shadow._activity
            assert activity is state.default.reports._activity
            with state.service.places.reserved():
                assert activity.is_busy()
            await until(activity.is_idle)
            state.pool.state("int8").state = "loading"
            assert activity.is_busy()
            state.pool.state("int8").state = "unloaded"

    asyncio.run(work())
