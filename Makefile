# `make serve` and `make test` set up all they need in .venv: a Python 3.10 or newer with pip is enough.
PYTHON ?= python3
ADDRESS ?= 127.0.0.1:5000
DOCS_ADDRESS ?= 127.0.0.1:8000
FUZZ_SECONDS ?= 60
SCHEDULES ?= 20000
MOVE_SCHEDULES ?= 10000
MOVING ?= 2000
TUNNELS ?= 500
REQUESTS ?= 10000000
CONNECTIONS ?= 100000
ROLLOUT_REQUESTS ?= 100000
# Tests mostly wait: for time limits, for processes that start.
JOBS ?= $(shell echo $$((2 * $$(nproc) + 1)))

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# $(call install,EXTRA): with the versions of constraints.txt, or with any where the package index lacks one of those.
install = $(PIP) --constraint constraints.txt --editable '.[$(1)]' || { \
	echo 'cannot install the versions of constraints.txt; trying others' >&2; $(PIP) --editable '.[$(1)]'; }

.PHONY: help serve test test-pure compiled quick matrix next-python core without-linux sanitize endure fuzz inject mutants schedules move-schedules moves rollout check bench bench-programs docs docs-serve screenshots load \
    sslyze news lock release-check ci ci-programs ci-lint ci-docs ci-test ci-smoke ci-package ci-load clean

help:
	@echo 'make serve   the echo server, on 127.0.0.1:5000 (ADDRESS=...)'
	@echo 'make test    the tests; make quick those of them that are quick, in a minute'
	@echo 'make test-pure  the tests of what is compiled there, in pure Python'
	@echo 'make compiled  compiles the hot path again after a change, as the targets above do; GTCPSERVER_PURE=1 for pure Python'
	@echo 'make matrix  the core tests under every CPython from 3.10 on that is here (in PATH, or by pyenv); MINORS="10 12"'
	@echo '             WITH="gevent==24.2.1 greenlet==3.0.0" for some of them with other versions'
	@echo 'make next-python  the core tests under the newest CPython of Debian, in a folder, as root; NEXT="14 15" for others'
	@echo 'make without-linux  the core tests without what Linux alone has, as on a Mac'
	@echo 'make sanitize  the core tests of what is compiled, under AddressSanitizer, and with Python looking for mistakes'
	@echo 'make endure  10 million requests and 100,000 connections, which must leave nothing behind (REQUESTS=, CONNECTIONS=)'
	@echo 'make fuzz    the fuzzers, for a minute each (FUZZ_SECONDS=...); some of them by FUZZ="name name"'
	@echo 'make inject  injects errors into every system call of every server, about an hour, and writes the table of'
	@echo '             docs/reliability.md; INJECT="--subject echo --call accept4" for a part, without the table'
	@echo 'make schedules   drives a simulated master through 20,000 random schedules, some two minutes (SCHEDULES=...)'
	@echo 'make move-schedules   moves connections and tunnels along chains of servers by 10,000 random schedules each, some'
	@echo '             15 minutes (MOVE_SCHEDULES=...)'
	@echo 'make moves   moves the connections of 2,000 clients and 500 tunnels over 20 reloads and 5 upgrades, in two minutes'
	@echo '             or more (MOVING=..., TUNNELS=...), and kills processes while 1,000 connections move'
	@echo 'make rollout   a rolling update of the pods in examples/deployment/kubernetes, in network namespaces behind'
	@echo '             haproxy, under load, as root: 2 minutes (ROLLOUT_REQUESTS=...)'
	@echo 'make mutants plants small bugs one at a time, and says which the tests do not see, some 20 minutes (MUTANTS=pattern)'
	@echo 'make check   lint, format, types, who may import what (.importlinter), and names of news files (changes/)'
	@echo 'make bench   the benchmarks against peers, some 90 minutes; as root it installs wrk, haproxy and nginx'
	@echo 'make docs    the documentation as HTML, in docs/_build/html'
	@echo 'make docs-serve   the same, served on http://127.0.0.1:8000 (DOCS_ADDRESS=...)'
	@echo 'make screenshots  the pictures of the status page, docs/screenshots/status-*.png, taken with Chromium'
	@echo 'make load    locust with servers to load, on http://localhost:8089'
	@echo 'make sslyze  installs sslyze, with which `make test` looks for weak TLS; without it that test is skipped'
	@echo 'make news    what CHANGELOG.md will say of the files in changes/'
	@echo 'make lock    renews constraints.txt, the versions of what the other targets install (PACKAGE="name ...": only those)'
	@echo 'make release-check   builds the packages of a release in dist/ and checks them; see docs/releasing.md'
	@echo 'make ci      everything, also on a fresh machine; its steps alone: make ci-programs, ci-lint, ci-docs, ci-test,'
	@echo '             ci-smoke, ci-package, ci-load'
	@echo 'make clean   remove .venv and everything else that can be made again'

# What is compiled where a C compiler and Python's headers are; GTCPSERVER_PURE=1 in the environment is for pure Python.
TYPES := $(wildcard gtcpserver/*.pxd gtcpserver/*/*.pxd)
COMPILED_FROM := setup.py gtcpserver/_build.py $(TYPES) $(wildcard $(TYPES:.pxd=.py))
PURE := $(filter-out 0 false f no n off,$(GTCPSERVER_PURE))

serve: $(VENV)/serve.stamp
	exec $(BIN)/gtcpserver echo --bind '$(ADDRESS)'

test: compiled
	@$(BIN)/gtcpserver --version
	$(BIN)/python -m pytest -q -n $(JOBS)

# Of the rooms that have compiled modules, of those that use them most, and of what reads their frames; without what
# starts, configures and stops a server, which is pure Python in both forms.
test-pure: $(VENV)/dev.stamp
	GTCPSERVER_PURE=1 $(BIN)/python -m pytest -q -n $(JOBS) $(addprefix tests/,adapters admission connection diagnostics \
	    pool server testing tls transfer test_forwarder.py) $(addprefix --ignore=tests/,adapters/test_adapters.py \
	    diagnostics/test_logs.py diagnostics/test_logs_config.py server/test_stop_aside.py server/test_stop_background.py \
	    testing/test_check_faults.py tls/test_config.py)

# Without those that are marked slow.
quick: compiled
	$(BIN)/python -m pytest -q -n 2 -m 'not slow'

# What depends on the interpreter and on gevent's greenlets most.
CORE := $(addprefix tests/,server/test_server.py connection/test_connection.py server/test_stop.py pool/test_pool.py \
    tls/test_tls.py transfer/test_relay.py server/test_acceptor.py supervisor/test_supervisor.py proxy/test_socks.py \
    cli/test_cli.py testing/test_testing.py testing/test_check_faults.py)

# As on a Mac: what Linux alone has is taken away, see tests/kit/without_linux. The tests of just that are left out.
without-linux: compiled
	PYTHONPATH=$(abspath tests/kit/without_linux) $(BIN)/python -m pytest -q -n 2 \
	    $(addprefix --deselect=tests/,$(shell cat tests/kit/without_linux/of_linux.txt)) $(CORE) tests/connection \
	    tests/transfer/test_sendfile.py

# Each in an environment of its own, .venv-3.X. Then with other versions of what is called from C, such as the oldest:
# make matrix MINORS="10 11" WITH="gevent==24.2.1 greenlet==2.0.0"; MINORS=12 WITH="gevent==24.2.1 greenlet==3.0.0".
MINORS ?= 10 11 12 13 14 15

matrix:
	@failed=; \
	for minor in $(MINORS); do \
	    for python in python3.$$minor $(HOME)/.pyenv/versions/3.$$minor.*/bin/python; do \
	        "$$python" -c "import sys; sys.exit(sys.version_info[:2] != (3, $$minor))" 2>/dev/null || continue; \
	        echo "== $$("$$python" -V)"; \
	        $(MAKE) --no-print-directory PYTHON="$$python" VENV=.venv-3.$$minor$(if $(WITH),-with) core || failed="$$failed 3.$$minor"; \
	        continue 2; \
	    done; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

next-python:
	NEXT='$(NEXT)' .ci/next-python

core: compiled
	$(if $(WITH),$(PIP) $(WITH) && $(BIN)/python setup.py --quiet build_ext --inplace --force)
	$(BIN)/python -m pytest -q -n 2 $(CORE)

# What the hot path's own C can get wrong: memory that is used after it was freed, references that are lost. A copy of
# the sources, since a build for AddressSanitizer cannot be loaded without it. Python's own allocator (PYTHONMALLOC)
# would hide what happens within its pools. greenlet copies stacks, and leaks are what `endure` looks for: both are
# left out (asan-stack, detect_leaks). Undefined behaviour ends the process, too. curl hangs beside libasan, and what was
# freed is kept for a while, so that memory grows.
SANITIZED := .sanitized
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined --param asan-stack=0 -fno-omit-frame-pointer
SANITIZED_TESTS := $(addprefix tests/,connection pool transfer tls/test_tls.py tls/test_layer.py \
    server/test_server.py server/test_stop.py server/test_acceptor.py server/test_accept_loop.py server/test_faults.py \
    server/test_linger_at_stop.py server/test_time_limits.py adapters/test_stream_server.py)

sanitize: compiled
	PYTHONDEVMODE=1 PYTHONMALLOC=debug $(BIN)/python -m pytest -q -n $(JOBS) $(SANITIZED_TESTS)
	mkdir -p $(SANITIZED)
	git ls-files -z --cached --others --exclude-standard | tar -c --null --ignore-failed-read -T - | tar -x -C $(SANITIZED)
	cd $(SANITIZED) && CFLAGS='$(SANITIZE)' $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && PYTHONPATH="$$PWD" PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    $(abspath $(BIN))/python -m pytest -q -n $(JOBS) -k 'not curl and not ten_thousand' $(SANITIZED_TESTS)

endure: compiled
	GTCPSERVER_REQUESTS=$(REQUESTS) GTCPSERVER_CONNECTIONS=$(CONNECTIONS) \
	    $(BIN)/python -m pytest -q -n 0 --durations=0 tests/server/test_nothing_stays.py

# FUZZ="chunks socks" FUZZ_SECONDS=3600; FUZZ=chunks FUZZ_REPLAY=file for one input. See tests/fuzz/README.md.
fuzz: compiled
	cd tests && $(abspath $(BIN))/python -m fuzz --seconds $(FUZZ_SECONDS) \
	    $(if $(FUZZ_REPLAY),--replay '$(abspath $(FUZZ_REPLAY))') $(FUZZ)

inject: compiled
	PYTHONPATH=tests $(BIN)/python -m injection --quiet $(if $(INJECT),$(INJECT),--write docs/reliability.md)

# Of deaths, timeouts, signals and failing calls; see tests/supervisor/test_schedules.py.
schedules: compiled
	GTCPSERVER_SCHEDULES=$(SCHEDULES) $(BIN)/python -m pytest -q -o timeout=0 tests/supervisor/test_schedules.py

# Of writes, half-closes, resets and moves; see tests/handover/test_connection_schedules.py, and the others.
move-schedules: compiled
	GTCPSERVER_MOVE_SCHEDULES=$(MOVE_SCHEDULES) $(BIN)/python -m pytest -q -n 2 -o timeout=0 -k schedules \
	    $(addprefix tests/handover/test_,connection_schedules.py schedules.py tunnels.py)

# See tests/supervisor/test_handover_endures.py, and the others of them.
moves: compiled
	GTCPSERVER_MOVES=1000 GTCPSERVER_MOVING_CLIENTS=$(MOVING) GTCPSERVER_MOVING_TUNNELS=$(TUNNELS) \
	    GTCPSERVER_MOVING_RELOADS=20 GTCPSERVER_MOVING_UPGRADES=5 GTCPSERVER_MOVING_SECONDS=120 \
	    $(BIN)/python -m pytest -q -n 0 -o timeout=0 $(addprefix tests/supervisor/test_, handover_endures.py \
	    handover_killed.py handover_redis.py tunnels_of_programs.py upgrade_installed.py)

rollout: compiled
	GTCPSERVER_ROLLOUT_REQUESTS=$(ROLLOUT_REQUESTS) $(BIN)/python -m pytest -q -s -n 0 -o timeout=0 \
	    -k 'rolling or loses' tests/examples/test_kubernetes.py

# The list is tests/mutants.toml.
mutants: $(VENV)/dev.stamp
	$(BIN)/python tests/mutants.py -j 2 $(MUTANTS)

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@news=$$($(BIN)/towncrier build --draft --version next 2>&1) || { echo "$$news" >&2; exit 1; }

news: $(VENV)/dev.stamp
	@$(BIN)/towncrier build --draft --version next

# One set for every Python from 3.10 on.
lock: $(VENV)/release.stamp
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --python $(BIN)/python --all-extras \
	    $(if $(PACKAGE),$(addprefix --upgrade-package ,$(PACKAGE)),--upgrade) \
	    --annotation-style line --custom-compile-command 'make lock' pyproject.toml --output-file constraints.txt

release-check: $(VENV)/dev.stamp $(VENV)/release.stamp
	.ci/release-check

ci:
	.ci/run

ci-programs ci-lint ci-docs ci-test ci-smoke ci-package ci-load: ci-%:
	.ci/$*

# All of them, even where one fails.
bench: bench-programs $(VENV)/bench.stamp
	@status=0; for name in "" .transfers .proxies .workers .adapters .monitoring .options; do \
	    $(BIN)/python -m loadtests.bench$$name || status=$$?; \
	done; exit $$status

bench-programs:
	@$(PYTHON) -m loadtests.bench.machine

# -W: a link or anchor that leads nowhere, or a page that no table of contents has, is an error. All pages each time
# (-E -a): one that has not changed may link to one that has.
docs: $(VENV)/docs.stamp
	$(BIN)/sphinx-build -M html docs docs/_build -E -a -W --keep-going -n -q

# Of the status page, by Chromium: docs/screenshots/status-*.png.
screenshots: compiled
	$(BIN)/python docs/screenshots.py

docs-serve: docs
	exec $(BIN)/gtcpserver files docs/_build/html --bind '$(DOCS_ADDRESS)'

load: $(VENV)/load.stamp
	$(BIN)/locust -f loadtests/load/locustfile.py --start-servers --web-host 127.0.0.1

# Debian's python3 has no ensurepip without its package python3-venv: then the pip outside installs the one inside.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, PYTHON=$(PYTHON) is " + sys.version.split()[0])'
	@echo 'creating $(VENV) ...'
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	    || { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $@ install --quiet pip; } \
	    || { rm -rf $(VENV); exit 1; }

# The stamps say what is installed, so that only the first run takes its time. pip keeps a copy of the version, too.
INSTALLED_FROM := pyproject.toml constraints.txt gtcpserver/_version.py

# With what a user would get today.
$(VENV)/serve.stamp: $(INSTALLED_FROM) $(COMPILED_FROM) | $(BIN)/python
	$(PIP) --editable '.[cli]'
	@touch $@

$(addprefix $(VENV)/,$(addsuffix .stamp,dev bench docs load release)): $(VENV)/%.stamp: $(INSTALLED_FROM) | $(BIN)/python
	$(call install,$*)
	@touch $@

# They have no Cython of their own.
$(VENV)/bench.stamp $(VENV)/load.stamp: $(COMPILED_FROM)

# What has not changed since it was installed is not compiled again.
compiled: $(VENV)/dev.stamp $(if $(PURE),,$(VENV)/compiled.stamp)

$(VENV)/compiled.stamp: $(COMPILED_FROM) $(VENV)/dev.stamp
	@$(BIN)/python -W ignore -c 'import gtcpserver, sys; sys.exit(not gtcpserver.compiled)' \
	    || $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# An environment of its own: it wants an older cryptography than the tests. So constraints.txt does not have it.
sslyze: $(VENV)-sslyze/stamp

$(VENV)-sslyze/stamp: | $(BIN)/python
	$(BIN)/python -m venv $(VENV)-sslyze
	$(VENV)-sslyze/bin/python -m pip install --quiet --disable-pip-version-check sslyze==6.3.1
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-* $(SANITIZED) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .fuzz \
	    .import_linter_cache
	find gtcpserver \( -name '*.so' -o -name '_build.*.txt' \) -delete
	find . -name __pycache__ -prune -exec rm -rf {} +
