"""Profiles of the processes of this replica: the agent's own here, those of relays over the control channel."""

from router.agent.control_server import ControlServer, RelayGoneError
from router.shm.control import ControlError, Failed, Recorded, RecordProfile
from twofold.runtime import sampler
from twofold.runtime.port import ProcessGoneError, Wanted

AGENT = "agent"
ANSWER_S = 10.0
"""A busy relay may need this long beyond the profile itself."""


class ReplicaProfiles:
    """Takes profiles of the agent and its relays."""

    def __init__(self, control: ControlServer) -> None:
        self._control = control

    def processes(self) -> list[str]:
        """Names of the processes that can be profiled now."""
        return [*(f"relay-{index}" for index in self._control.relays), AGENT]

    async def record(self, wanted: Wanted) -> sampler.Profile:
        """One profile. Raises BusyError, TimeoutError, ProcessGoneError."""
        if wanted.process == AGENT:
            return await sampler.record(AGENT, seconds=wanted.seconds, hz=wanted.hz, clock=wanted.clock)
        relay = int(wanted.process.removeprefix("relay-"))
        message = RecordProfile(id=self._control.next_id(), seconds=wanted.seconds, hz=wanted.hz, clock=wanted.clock)
        try:
            answer = await self._control.ask(relay, message, wanted.seconds + ANSWER_S)
        except (RelayGoneError, ControlError) as error:
            raise ProcessGoneError(str(error)) from None
        if isinstance(answer, Failed):
            raise ProcessGoneError(answer.message)
        if not isinstance(answer, Recorded) or answer.profile is None:
            raise sampler.BusyError(f"a profile of {wanted.process} is being taken already")
        return answer.profile
