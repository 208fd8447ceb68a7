# shellcheck shell=bash
# What the steps of .ci/run share. Sourced by each of them: the checkout is the working directory then, $work is a folder
# that ends with the step, and what the step started ends with it, too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

step() { printf '\n== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

PATH=$PATH:/usr/sbin:/sbin # of an ordinary user's PATH they are no part, and mariadbd and sshd are there

# Tests start Python a thousand times: without .pyc files each would compile the package again, 0.15 s.
unset PYTHONDONTWRITEBYTECODE

# Benchmarks, load tests and some tests need more descriptors than the usual 1024.
limit=$(ulimit -Hn)
if [ "$limit" = unlimited ] || [ "$limit" -gt 65536 ]; then limit=65536; fi
ulimit -Sn "$limit"

work=$(mktemp -d)
home=$work/home user='' made=''
cleanup() {
    local pids
    pids=$(jobs -p)
    # shellcheck disable=SC2086 # one word a process
    [ -z "$pids" ] || kill $pids 2>/dev/null || true
    wait
    if [ -n "$made" ]; then
        pkill -KILL -u "$made" || true
        userdel --force "$made" || true
    fi
    rm -rf "$work"
}
trap cleanup EXIT

# -- environments ------------------------------------------------------------------------------------------------------

# extra NAME: what can be installed must be; without a package index there is only what is there.
extra() {
    make ".venv/$1.stamp" && return
    ! .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work/pip" click ||
        fail "pip works, and cannot install '.[$1]'"
    echo "no package index: going on without '.[$1]'"
}

# copy_checkout FOLDER: what is here, committed or not.
copy_checkout() {
    git ls-files -z --cached --others --exclude-standard |
        tar --create --null --files-from - --ignore-failed-read 2>/dev/null |
        tar --extract --directory "$1" || fail "cannot copy this checkout"
}

# make_clone: sets $python, and $user where there can be an ordinary user, that is for root. A clone of what is here,
# committed or not, is in $home/gtcpserver then.
make_clone() {
    local config name=gtcpserver-$$
    mkdir -p "$home/gtcpserver" "$home/.config/pip"
    copy_checkout "$home/gtcpserver"
    for config in ~/.pip/pip.conf "${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf"; do
        [ ! -f "$config" ] || cp "$config" "$home/.config/pip/pip.conf"
    done
    chmod 711 "$work" # the user's home is in it
    if [ "$(id -u)" = 0 ] && useradd --no-create-home --home-dir "$home" --user-group "$name"; then
        user=$name made=$name
        chown -R "$user:" "$home"
        find_python && return
        user=
        chown -R "$(id -un):" "$home"
    fi
    [ "$(id -u)" != 0 ] || echo "there can be no ordinary user: this is done as root"
    find_python || fail "no Python 3.10 or newer that can make an environment"
}

find_python() {
    for python in /usr/bin/python3 "$(command -v "${PYTHON:-python3}")"; do
        as_user "$python" -c 'import ensurepip, os, sys; os.stat("Makefile"); sys.exit(sys.version_info < (3, 10))' &&
            return
        echo "${user:-$(id -un)} cannot make an environment with $python"
    done
    return 1
}

# become_user COMMAND...: does not return. The command runs in the clone with 1,024 descriptors, and with nothing of this
# environment but how pip gets packages.
become_user() {
    local kept setpriv=()
    mapfile -t kept < <(env | grep -E '^(CI|PIP_[A-Z_]+|[a-z]+_proxy|[A-Z]+_PROXY|SSL_CERT_FILE)=')
    [ -z "$user" ] || setpriv=(setpriv --reuid "$user" --regid "$user" --init-groups)
    cd "$home/gtcpserver" && ulimit -n 1024 || exit
    exec "${setpriv[@]}" env -i "${kept[@]}" HOME="$home" PATH=/usr/local/bin:/usr/bin:/bin "$@"
}

as_user() (become_user "$@")

# once_more PYTEST...: the tests that failed run once more, one at a time, as those of CPython do (regrtest --rerun). One
# that passes then is flaky: a bug in the test or in the server, to be looked into, but not in the change that is judged
# here. More than two are no accident.
once_more() {
    local failed again=("$@" -q -n 0 --last-failed --last-failed-no-failures none)
    mapfile -t failed < <("${again[@]}" --collect-only | grep ::)
    [ ${#failed[@]} -le 2 ] || fail "${#failed[@]} tests"
    step "tests that failed, once more and alone"
    "${again[@]}" || fail "${failed[*]}"
    printf 'FLAKY, to be looked into: %s\n' "${failed[@]}"
}

# -- servers -----------------------------------------------------------------------------------------------------------

# start COMMAND...: sets $port and $server, the process that said where it listens, and $job, the one started.
start() {
    : >"$work/log" # the job empties it a moment later, and what the last one said is there until then
    "$@" >"$work/log" 2>&1 &
    job=$!
    for _ in $(seq 300); do
        port=$(sed -n 's/.*listening on 127\.0\.0\.1:\([0-9]*\).*/\1/p' "$work/log")
        [ -z "$port" ] || break
        kill -0 "$job" 2>/dev/null || break
        sleep 0.1
    done
    [ -n "$port" ] || { cat "$work/log"; fail "$* did not start"; }
    server=$(sed -n 's/.*listening on .*(pid \([0-9]*\).*/\1/p' "$work/log")
    server=${server:-$job}
}

# exchange REQUEST ANSWER: sends a line, expects a line that begins so.
exchange() {
    local answer
    exec 3<>"/dev/tcp/127.0.0.1/$port"
    printf '%b' "$1" >&3
    IFS= read -r -t 20 answer <&3 || fail "no answer to $1"
    exec 3>&-
    [[ $answer == "$2"* ]] || fail "expected $2, got $answer"
}

# stop: SIGTERM must end it with exit status 0.
stop() {
    local status=0
    kill -TERM "$server"
    wait "$job" || status=$?
    [ "$status" = 0 ] || { cat "$work/log"; fail "exit status $status after SIGTERM"; }
}
