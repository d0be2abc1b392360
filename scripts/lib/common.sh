# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Common to the shell scripts: where things are kept, one way to say what they are
# for, one to say what went wrong, one to run a long step. Set $top before sourcing
# this; with --help the script then ends there.

# Everything that is built, fetched or cached. Inside the clone by default.
BUILD=$(realpath -m "${BUILD:-$top/build}")
LOGS=$BUILD/log

# usage: the comment at the top of the script.
usage() {
	sed -n '4,/^$/s/^# \{0,1\}//p' "$0"
}

case ${1:-} in
-h | --help)
	usage
	exit
	;;
esac

# die MESSAGE [REMEDY]: the one clear message on standard error, status 1.
die() {
	echo "error: $1" >&2
	[ -z "${2:-}" ] || echo "       $2" >&2
	exit 1
}

# fit PATH: one that the kernel's build and mount options do not take for something else.
fit() {
	case $1 in
	*[[:space:]:]*) die "$1: a path with spaces or colons cannot be used" "move it" ;;
	esac
}
fit "$top"
fit "$BUILD"

# step WHAT LOG COMMAND...: run COMMAND with its output in $LOGS/LOG.log; show
# what is being done and for how long, and the log's end if it fails.
step() {
	local what=$1 log=$LOGS/$2.log begin=$SECONDS pid status=0 tick
	shift 2
	mkdir -p "$LOGS"
	printf '  %s ...\n' "$what"
	set +e
	(set -e; "$@") >"$log" 2>&1 </dev/null &
	pid=$!
	set -e
	# shellcheck disable=SC2064 # the pid of now
	trap "kill $pid 2>/dev/null; trap - INT TERM; kill -INT $$" INT TERM
	tick=$SECONDS
	while kill -0 "$pid" 2>/dev/null; do
		sleep 0.2
		if [ -t 1 ]; then
			printf '\r  %s ... %d s ' "$what" $((SECONDS - begin))
		elif [ $((SECONDS - tick)) -ge 60 ]; then
			tick=$SECONDS
			printf '    still at it after %d s\n' $((SECONDS - begin))
		fi
	done
	wait "$pid" || status=$?
	trap - INT TERM
	[ ! -t 1 ] || printf '\r\033[K'
	if [ "$status" != 0 ]; then
		echo "    the end of $log:" >&2
		tail -n 15 "$log" | sed 's/^/    | /' >&2
		die "$what: failed after $((SECONDS - begin)) s (status $status)" \
			"the whole output is in $log"
	fi
	printf '  %s: done in %d s\n' "$what" $((SECONDS - begin))
}

# exclusive NAME: wait until nobody else does NAME; held until this script ends.
exclusive() {
	mkdir -p "$BUILD"
	exec 9>"$BUILD/.$1.lock"
	flock 9
}
