"""A handler or hook that can never work is refused when it is given, in the same words everywhere."""

import functools
import socketserver
from functools import partial

import pytest

from gtcpserver import ConfigError, Connection, Server, StreamServer, from_wsgi, run
from gtcpserver.callables import HOOKS, full_name_of, name_of
from gtcpserver.supervisor import Hooks

SERVER_HOOKS = sorted(name for name in HOOKS if name.startswith("on_"))
WORKER_HOOKS = sorted(HOOKS.keys() - SERVER_HOOKS)


def wanted_by(hook):
    return f"{('one argument', 'two arguments')[len(HOOKS[hook]) - 1]}, {' and '.join(HOOKS[hook])}"


async def coroutine(conn, *more):
    pass


async def async_generator(conn, *more):
    yield


def generator(conn, *more):
    yield


def nothing():
    pass


def three(one, two, three):
    pass


def keyword(conn, *, database):
    pass


class Async:
    async def __call__(self, conn, *more):
        pass

    async def method(self, conn, *more):
        pass

    @staticmethod
    async def static(conn, *more):
        pass


class Handling:
    def __init__(self, limit=1):
        pass

    def __call__(self, conn):
        pass

    def generator(self, conn):
        yield

    def method(self, conn):
        pass

    @classmethod
    def of_class(cls, conn):
        pass


class Serving:
    """It would serve when it is made, if a class were a handler."""

    def __init__(self, conn):
        pass


class Old(socketserver.BaseRequestHandler):
    pass


ASYNC = {
    "a coroutine function": coroutine,
    "an async generator": async_generator,
    "a partial of one": partial(coroutine),
    "a partial of a partial": partial(partial(coroutine)),
    "an object": Async(),
    "a partial of an object": partial(Async()),
    "a method": Async().method,
    "a static method": Async.static,
}

GENERATORS = {"a function": generator, "a partial": partial(generator), "a method": Handling().generator}

ARGUMENTS = {
    "none": (nothing, r"it takes \(\)"),
    "three": (three, r"it takes \(one, two, three\)"),
    "a keyword": (keyword, r"it takes \(conn, \*, database\)"),
    "a partial that has it already": (partial(nothing), r"it takes \(\)"),
    "a method without its object": (Handling.method, r"it takes \(self, conn\)"),
    "an object": (functools.partial(three, 1), r"it takes \(two, three\)"),
}


@pytest.mark.parametrize("handler", ASYNC.values(), ids=ASYNC)
def test_what_is_async_is_no_handler(handler):
    with pytest.raises(ConfigError, match=r"^handler .* is async; a handler is a plain function that blocks$"):
        Server("127.0.0.1:0", handler)


@pytest.mark.parametrize("handler", GENERATORS.values(), ids=GENERATORS)
def test_a_generator_is_no_handler(handler):
    with pytest.raises(ConfigError, match=r"^handler .* is a generator; a handler is a plain function that blocks$"):
        Server("127.0.0.1:0", handler)


@pytest.mark.parametrize(("handler", "takes"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_handler_takes_one_argument(handler, takes):
    with pytest.raises(ConfigError, match=f"^handler .* must take one argument, the connection; {takes}$"):
        Server("127.0.0.1:0", handler)


@pytest.mark.parametrize(
    ("handler", "instead"),
    [
        (Handling, r"its instances are handlers: give one, such as Handling\(\)"),
        (Serving, r"give a function, such as lambda conn: Serving\(conn\)"),
        (Old, r"give from_socketserver\(Old\)"),
        (socketserver.TCPServer, r"give from_socketserver\(TCPServer\)"),
        (Connection, r"give a function, such as lambda conn: Connection\(conn\)"),
    ],
)
def test_a_class_is_no_handler_and_the_message_says_what_is(handler, instead):
    with pytest.raises(ConfigError, match=rf"^handler \S+\.{handler.__name__} is a class; {instead}$"):
        Server("127.0.0.1:0", handler)


def test_the_name_in_the_message_is_one_that_can_be_searched_for():
    with pytest.raises(ConfigError, match=r"handler (tests\.)?test_callables\.Async\.method is async"):
        Server("127.0.0.1:0", Async().method)


def with_database(handler):
    @functools.wraps(handler)
    def serve(conn):
        handler(conn, "database", "user")

    return serve


def in_a_loop(handler):
    @functools.wraps(handler)
    def serve(conn):
        list(handler(conn))

    return serve


def claims_another_signature(conn):
    pass


claims_another_signature.__signature__ = __import__("inspect").signature(three)

SERVES = {
    "a function": lambda conn: None,
    "with defaults": lambda conn, limit=5: None,
    "any arguments": lambda *args, **options: None,
    "an object": Handling(),
    "a method": Handling().method,
    "a class method": Handling.of_class,
    "a partial": partial(three, 1, 2),
    "a builtin": print,
    "a method of a builtin": [].append,
    "one that a decorator gives more arguments": with_database(three),
    "one whose decorator runs the generator": in_a_loop(generator),
    "one whose decorator claims another signature": claims_another_signature,
}


@pytest.mark.parametrize("handler", SERVES.values(), ids=SERVES)
def test_what_can_serve_is_taken(handler):
    assert Server("127.0.0.1:0", handler).handler is handler


@pytest.mark.parametrize("name", SERVER_HOOKS)
@pytest.mark.parametrize(("hook", "fault"), [(coroutine, "async"), (Async(), "async"), (generator, "a generator")])
def test_hooks_of_a_server_are_plain_functions(name, hook, fault):
    # An async on_connect would return a coroutine, which is not False, and admit everybody.
    with pytest.raises(ConfigError, match=f"^{name} .* is {fault}; a hook is a plain function that blocks$"):
        Server("127.0.0.1:0", print, **{name: hook})


@pytest.mark.parametrize("name", SERVER_HOOKS)
def test_hooks_of_a_server_take_what_they_are_given(name):
    with pytest.raises(ConfigError, match=rf"^{name} .* must take {wanted_by(name)}; it takes \(one, two, three\)$"):
        Server("127.0.0.1:0", print, **{name: three})


@pytest.mark.parametrize("name", WORKER_HOOKS)
def test_hooks_of_workers_are_checked_too(name):
    with pytest.raises(ConfigError, match=f"^{name} .* is async; a hook"):
        Hooks(**{name: coroutine})
    with pytest.raises(ConfigError, match=f"^{name} .* must take {wanted_by(name)}; it takes"):
        Hooks(**{name: three})


@pytest.mark.parametrize("options", [{}, {"workers": 2}])
def test_run_refuses_them_before_it_listens(options):
    with pytest.raises(ConfigError, match="is async"):
        run(coroutine, "127.0.0.1:0", **options)
    with pytest.raises(ConfigError, match="handler 5 is not callable, it is an int"):
        run(5, "127.0.0.1:0", **options)


@pytest.mark.parametrize("option", [{"pin_cpus": True}, {"worker_start": print}])
def test_run_without_workers_names_an_option_that_needs_them(option):
    with pytest.raises(ConfigError, match=f"{next(iter(option))} needs workers; workers=1 is a master with one worker"):
        run(print, "127.0.0.1:0", **option)


def test_run_with_workers_refuses_a_hook_of_workers_before_it_listens():
    with pytest.raises(ConfigError, match=r"worker_start .* is async"):
        run(print, "127.0.0.1:0", workers=2, worker_start=coroutine)


def test_an_application_for_asgi_is_none_for_wsgi():
    async def application(scope, receive, send):
        pass

    with pytest.raises(ConfigError, match="is async; a WSGI application is a plain function that blocks"):
        from_wsgi(application)
    with pytest.raises(ConfigError, match=r"must take two arguments, the environment and start_response; it takes \("):
        from_wsgi(three)


def test_an_application_may_be_a_generator_or_a_class():
    class Application:
        def __init__(self, environ, start_response):
            pass

    def application(environ, start_response):
        yield b""

    from_wsgi(Application)
    from_wsgi(application)


def test_stream_server_takes_what_gevents_takes():
    server = StreamServer(("127.0.0.1", 0), coroutine)
    server.close()


@pytest.mark.parametrize(
    ("found", "name", "full"),
    [
        (nothing, "nothing", f"{__name__}.nothing"),
        (Async.method, "Async.method", f"{__name__}.Async.method"),
        (Async, "Async", f"{__name__}.Async"),
        (partial(partial(nothing)), "nothing", None),
        (5, "int", "5"),
    ],
)
def test_functions_are_named_as_they_were_defined(found, name, full):
    assert name_of(found) == name
    assert full_name_of(found) == (full or repr(found))


def test_a_coroutine_has_its_functions_name():
    running = coroutine(None)
    assert name_of(running) == full_name_of(running) == "coroutine"
    running.close()
