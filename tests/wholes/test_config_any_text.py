"""Any text given to a reader of configuration is a configuration or a mistake that is told, and no other error."""

import contextlib
import dataclasses
import os
import string
import types
from typing import Literal, Union, get_args, get_origin, get_type_hints

import click
import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as so_many
from hypothesis import strategies as st

from gtcpserver.cli import _read_monkey_patch
from gtcpserver.cli.commands import load_command
from gtcpserver.cli.settings import key_of, settings_of
from gtcpserver.errors import ConfigError
from gtcpserver.files.toml_file import DEEPEST, Lines, parse_text
from gtcpserver.proxy import settings
from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.supervisor.config import SupervisorConfig

# -- texts that parsers stumble over -----------------------------------------------------------------------------------

DEEP = 20_000
TEXTS = {
    "a huge integer": ("\nx = " + "9" * 5000, "proxy.toml line 2: whole numbers must be"),
    "a huge integer with underscores": ("\n\nx = 1" + "_1" * 5000, "proxy.toml line 3: whole numbers must be"),
    "a huge hexadecimal one": ("\nx = 0x" + "f" * 5000, r"proxy.toml line 2: whole numbers must be .* \(at x\)"),
    "one that is too large by one": ("[a]\nx = [1, 9223372036854775808]", r"line 2: whole numbers .*at a.x\[1\]"),
    "one that is too small by one": ("x = -9223372036854775809", "line 1: whole numbers must be"),
    "deep arrays": ("\nx = " + "[" * DEEP + "]" * DEEP, "proxy.toml line 2: values must not be nested deeper than 32"),
    "deep inline tables": ("\nx = " + "{a = " * DEEP + "1" + "}" * DEEP, "proxy.toml line 2: values must not"),
    "deep arrays without an end": ("x = " + "[" * DEEP, "proxy.toml line 1: values must not"),
    "arrays over many lines": ("x = " + "[\n" * 100 + "]" * 100, "proxy.toml line 32: values must not"),
    "deep keys": ("\n" + "a." * 1000 + "b = 1", "proxy.toml line 2: values must not"),
    "a deep table": ("\n[" + ".".join("a" * 1000) + "]", "proxy.toml line 2: values must not"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_parsers_stumble_over(tmp_path, name):
    text, told = TEXTS[name]
    for read in (parse_config, parse_text):
        with pytest.raises(ConfigError, match=told):
            read(text, "proxy.toml")
    Lines(text)
    assert read_settings(tmp_path / "proxy.toml", text) == 2
    path = tmp_path / "monkey.toml"
    path.write_text("# monkey_patch\n" + text)
    assert _read_monkey_patch(str(path)) is True


def test_what_is_not_too_much():
    assert parse_text("x = [9223372036854775807, -9223372036854775808]", "")["x"][0] == 2**63 - 1
    nested = "x = " + "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1)
    assert parse_text(nested, "")["x"]


# -- structured ones ---------------------------------------------------------------------------------------------------

#: What is in files by mistake, or to see what happens.
STRINGS = st.one_of(
    st.sampled_from(
        [
            *("", "\0", "a\0b", "\n", " ", "any", "none", "direct", "auto", "same", "unix", "unix:", "unix:@", "fd:3"),
            *(
                "fd:" + "9" * 30,
                "/",
                "/dev/null",
                "/bin/false",
                "root",
                "/no/such/file",
                ".",
                "x" * 5000,
                "9" * 5000,
                "-1",
                "0",
                "nan",
            ),
            *("127.0.0.1:0", "[::1]:0", "*:1", "127.0.0.1:99999", "[::1%lo]:1", "[", "]", "::", "1.2.3.4/33", "10/8"),
            *("socks5://a:b@h:1", "http://h:" + "9" * 5000, "socks5://", "http://[::1]:1", "allow any", "deny from"),
            *("allow any:" + "9" * 5000, 'allow "', "through direct any", "allow from any to any with auth x"),
            *("$2b$04$", "$argon2id$v=19$m=1,t=1,p=1$x$x", "\u0661", "\u2028", "\U0010ffff", "é", "a" * 70 + ".b"),
        ]
    ),
    st.text(max_size=20),
)
SCALARS = st.one_of(
    STRINGS,
    st.booleans(),
    st.sampled_from([0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63)]),
    st.floats(),
    st.dates(),
    st.datetimes(),
    st.times(),
)
KEYS = st.one_of(st.sampled_from(["a", "direct", "default", "any", "users", ""]), st.text(max_size=5))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=5
)


NUMBERS = st.sampled_from([0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63)]) | st.floats()


def of_type(kind):
    """Values that a key may have by its type; what they mean is another thing."""
    if kind is bool:
        return st.booleans()
    if kind is int:
        return NUMBERS.filter(lambda number: isinstance(number, int))
    if kind is float:
        return NUMBERS
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is list:
        return st.lists(of_type(get_args(kind)[0]), max_size=3)
    if get_origin(kind) is dict:
        return st.dictionaries(KEYS, of_type(get_args(kind)[1]), max_size=2)
    if get_origin(kind) in (Union, types.UnionType):
        return st.one_of([of_type(one) for one in get_args(kind) if one is not type(None)])
    assert kind is str
    return STRINGS


def table(kind):
    return st.fixed_dictionaries({}, optional={name: of_type(one) for name, one in get_type_hints(kind).items()})


def wrong_table(kind):
    names = [field.name for field in msgspec.structs.fields(kind)]
    return st.dictionaries(st.sampled_from(names), VALUES, max_size=4)


def proxy_file(table):
    return st.fixed_dictionaries(
        {},
        optional={
            "listener": st.lists(table(settings.ListenerTable), max_size=2),
            "rules": table(settings.RulesTable),
            "auth": st.dictionaries(KEYS, table(settings.AuthTable), max_size=2),
            "upstream": st.dictionaries(KEYS, table(settings.UpstreamTable), max_size=2),
            "limits": table(settings.LimitsTable),
            "timeouts": table(settings.TimeoutsTable),
            "resolver": table(settings.ResolverTable),
            "http": table(settings.HttpTable),
            "log": table(settings.LogTable),
            "fast_open": st.booleans(),
        },
    )


def written(value):
    """A value in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(one if one.isalnum() else f"\\U{ord(one):08x}" for one in value) + '"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(key)} = {written(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def document(data):
    return "\n".join(f"{written(key)} = {written(value)}" for key, value in data.items())


@pytest.mark.slow
@given(st.text() | st.text(string.digits + string.ascii_letters + "[]{}=.\"'\n#_-+:,x ", max_size=60))
def test_any_text(text):
    with contextlib.suppress(ConfigError):
        parse_text(text, "proxy.toml")
    with contextlib.suppress(ConfigError):
        parse_config(text)
    Lines(text)


@pytest.mark.slow
@so_many(max_examples=40)
@given(proxy_file(table) | proxy_file(wrong_table))
def test_any_file_of_the_proxy(data):
    with contextlib.suppress(ConfigError):
        made = make_proxy(parse_config(document(data)))
        made.handler.server_stopped()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["ListenerTable", "RulesTable", "AuthTable", "UpstreamTable", "LimitsTable", "TimeoutsTable"]
)
def test_any_table_of_the_proxy(kind):
    """With everything else as it is when it is not given, so that no other mistake comes first."""
    name = kind.removesuffix("Table").lower()
    hints = get_type_hints(getattr(settings, kind))

    @so_many(max_examples=50)
    @given(st.sampled_from(sorted(hints)).flatmap(lambda key: st.tuples(st.just(key), of_type(hints[key]))))
    def check(entry):
        one = {"url": "http://127.0.0.1:1"} if name == "upstream" else {"name": "a"} if name == "listener" else {}
        one |= dict([entry])
        data = {name: [one] if name == "listener" else {"a": one} if name in ("auth", "upstream") else one}
        with contextlib.suppress(ConfigError):
            made = make_proxy(parse_config(document(data)))
            made.handler.server_stopped()

    check()


def read_settings(path, text, name="serve"):
    """The exit status with which a command ends that is given a file with settings; 0: it would go on."""
    path.write_text(text, encoding="utf-8", newline="")
    try:
        load_command(name).make_context(name, ["--config", str(path), *(["app:handle"] if name == "serve" else [])])
    except ConfigError:
        return 2
    except click.ClickException as error:
        return error.exit_code
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["serve", "forward", "files"])
def test_any_file_with_settings(tmp_path, name):
    keys = [key_of(parameter).split(".") for parameter in settings_of(load_command(name))]

    @so_many(max_examples=40)
    @given(st.dictionaries(st.sampled_from(range(len(keys))), VALUES | SCALARS, max_size=4))
    def check(values):
        text = "\n".join(f"{'.'.join(keys[place])} = {written(value)}" for place, value in values.items())
        assert read_settings(tmp_path / "app.toml", text, name) in (0, 2)

    check()


@pytest.mark.slow
@given(st.text())
def test_any_text_with_settings(tmp_path_factory, text):
    assert read_settings(tmp_path_factory.getbasetemp() / "any.toml", text) in (0, 2)


OF_SUPERVISORS = {
    field.name: of_type(get_type_hints(SupervisorConfig)[field.name]) for field in dataclasses.fields(SupervisorConfig)
}


@pytest.mark.slow
@given(
    st.sampled_from(sorted(OF_SUPERVISORS)).flatmap(lambda name: st.tuples(st.just(name), OF_SUPERVISORS[name])),
    st.integers(-(2**70), 2**70),
)
def test_any_configuration_of_a_supervisor(option, number):
    name, value = option
    if type(value) is int:
        value = number
    with contextlib.suppress(ConfigError):
        SupervisorConfig(**{name: value}).identity()


@pytest.mark.parametrize("option", ["user", "group"])
@pytest.mark.parametrize("value", ["\0", "9" * 5000, "4294967295", 2**32 - 1, 2**70, -1, "-1", "no such user", ""])
def test_users_that_no_host_has(option, value):
    with pytest.raises(ConfigError, match=f"{option} must be one of this host's, got "):
        SupervisorConfig(**{option: value})


def test_users_may_be_numbers():
    uid, gid, _ = SupervisorConfig(user=os.geteuid(), group=os.getegid()).identity()
    assert (uid, gid) == (os.geteuid(), os.getegid())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.parametrize("value", [0, "0", "4294967294"])
def test_users_may_be_numbers_that_have_no_name(value):
    assert SupervisorConfig(user=value, group=value).identity()[:2] == (int(value), int(value))


def test_more_processes_than_there_can_be():
    with pytest.raises(ConfigError, match="line 3: processes must be 1 to 1000, got 9223372036854775807"):
        parse_config('\n\n[auth.a]\ncommand = ["/bin/false"]\nprocesses = 9223372036854775807\n')
