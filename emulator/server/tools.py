"""Tool choice: what vLLM refuses, the call that is made up where one is demanded, and how it is shown.

The model writes a call as vLLM's ``hermes`` parser reads it. A tool is only called where the request names it or
requires one; under "auto" the answer is text. Arguments are a small instance of the tool's parameter schema.
"""

import json
from typing import Any

from emulator.server.errors import ApiError, parameter_error
from emulator.server.generation import ToolPlan
from emulator.server.hermes import call_frame
from emulator.server.settings import EngineSettings
from emulator.server.validation import Body
from emulator.structured import ConstraintError, parse_constraint
from emulator.tokens import decode_bytes

_USAGE = 'Correct usage: `{"type": "function", "function": {"name": "my_function"}}`'


def check_tool_choice(body: Body) -> None:
    """The checks before the model is looked up. Raises ApiError with vLLM's words."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    if tools == []:
        raise parameter_error(
            "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely.", "tools"
        )
    if choice in (None, "none"):
        return
    if tools is None:
        raise parameter_error("When using `tool_choice`, `tools` must be set.", "tool_choice")
    if isinstance(choice, dict):
        _check_named(choice, tools)
    elif choice not in ("auto", "required"):
        raise parameter_error(
            f'Invalid value for `tool_choice`: {choice}! Only named tools, "none", "auto" or "required" are supported.',
            "tool_choice",
        )


def _check_named(choice: dict[str, Any], tools: list[Any]) -> None:
    function = choice.get("function")
    if not isinstance(function, dict):
        raise parameter_error(
            f"Invalid value for `function`: `{function}` in `tool_choice`! {_USAGE}", "tool_choice.function"
        )
    if "name" not in function:
        raise parameter_error(
            f"Expected field `name` in `function` in `tool_choice`! {_USAGE}", "tool_choice.function.name"
        )
    name = function["name"]
    if not isinstance(name, str) or not name:
        raise parameter_error(
            f"Invalid `name` in `function`: `{name}` in `tool_choice`! {_USAGE}", "tool_choice.function.name"
        )
    if name not in [_function(tool).get("name") for tool in tools]:
        raise parameter_error(
            "The tool specified in `tool_choice` does not match any of the specified `tools`", "tool_choice"
        )


def plan_tool(body: Body, prompt: list[int], settings: EngineSettings) -> ToolPlan | None:
    """The call that the body demands, None if it demands none. Raises ApiError."""
    tools = body.get("tools")
    choice = body.get("tool_choice", "auto" if tools else None)
    if choice in (None, "none"):
        return None
    named = choice["function"]["name"] if isinstance(choice, dict) else None
    if not settings.tool_call_parser:
        if choice == "auto":
            raise ApiError('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set')
        shown = f'function "{named}"' if named else f'"{choice}"'
        raise ApiError(f"tool_choice={shown} requires --tool-call-parser to be set")
    if choice == "auto":
        return None
    tool = next((one for one in tools or [] if _function(one).get("name") == named), (tools or [{}])[0])
    return _planned(_function(tool), prompt, named=named is not None)


def _planned(function: dict[str, Any], prompt: list[int], *, named: bool) -> ToolPlan:
    parameters = function.get("parameters") or {"type": "object"}
    try:
        constraint = parse_constraint({"json": parameters}, None)
        arguments = (constraint.text(decode_bytes(prompt)) if constraint else None) or "{}"
    except ConstraintError as error:
        raise ApiError(str(error)) from None
    begin, end = call_frame(str(function.get("name", "")))
    return ToolPlan(text=begin + arguments + end, named=named)


def uses_tools(body: Body) -> bool:
    """Whether the model is shown tools that it may call."""
    return bool(body.get("tools")) and body.get("tool_choice") != "none"


def structural_tag(body: Body) -> str | None:
    """The constraint under which vLLM runs a body that demands a call; None if it demands none."""
    choice = body.get("tool_choice")
    if not body.get("tools") or choice in (None, "none", "auto"):
        return None
    named = choice["function"]["name"] if isinstance(choice, dict) else None
    tags = []
    for function in map(_function, body["tools"]):
        if named in (None, function.get("name")):
            begin, end = call_frame(str(function.get("name", "")))
            content = {"type": "json_schema", "json_schema": function.get("parameters") or {"type": "object"}}
            tags.append({"type": "tag", "begin": begin, "content": content, "end": end})
    form = {"type": "tags_with_separator", "tags": tags, "separator": "", "at_least_one": True}
    return json.dumps({"type": "structural_tag", "format": {**form, "stop_after_first": named is not None}})


def _function(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    return function if isinstance(function, dict) else {}


def finish_reason(plan: ToolPlan | None, reason: str | None) -> str | None:
    """The reason that the client sees: a call that was required, but not named, has one of its own."""
    return "tool_calls" if plan is not None and not plan.named and reason == "stop" else reason
