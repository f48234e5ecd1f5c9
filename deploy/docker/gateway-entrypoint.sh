#!/bin/sh
# Fill in the gateway's configuration from the environment and become nginx. The variables are those that
# deploy/gateway.py takes and mean the same, without TLS; their defaults are a container's. The shared secret is in the
# file AXON_GATEWAY_SECRET_FILE.
set -euf
export LC_ALL=C AXON_GATEWAY_DIR="${AXON_GATEWAY_DIR:-/tmp/gateway}"
source=${AXON_GATEWAY_SOURCE:-/etc/axon}

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

each() {   # each "before" "after" LIST: one `before address after;` for every address of a comma-separated list
    [ -n "$3" ] || return 0
    case ",$3," in *,,*) fail "there is an empty address in \"$3\"" ;; esac
    lines=
    IFS=,
    for address in $3; do
        case $address in *[!]A-Za-z0-9_.:/[-]*) fail "\"$address\" is no address: host:port or unix:/path" ;; esac
        lines="$lines${lines:+ }$1 $address$2;"
    done
    unset IFS
    printf '%s' "$lines"
}

whole() {   # whole NAME VALUE
    case $2 in '' | 0* | *[!0-9]* | ??????????*) fail "$1 is a whole number above 0, not \"$2\"" ;; esac
}

# A node without IPv6 refuses to listen on it.
if [ -e /proc/net/if_inet6 ]; then both=1; else both=; fi
listen=${AXON_GATEWAY_LISTEN:-8080${both:+,[::]:8080}}
probes=${AXON_GATEWAY_PROBES-8081${both:+,[::]:8081}}   # empty for none
export AXON_MAX_BODY_BYTES="${AXON_MAX_BODY_BYTES:-65536}" AXON_SLOW_CLIENT_S="${AXON_SLOW_CLIENT_S:-10}"
export AXON_GATEWAY_PROCESSES="${AXON_GATEWAY_PROCESSES:-2}"   # not one per core of a node that it shares
whole AXON_MAX_BODY_BYTES "$AXON_MAX_BODY_BYTES"
whole AXON_SLOW_CLIENT_S "$AXON_SLOW_CLIENT_S"
[ "$AXON_GATEWAY_PROCESSES" = auto ] || whole AXON_GATEWAY_PROCESSES "$AXON_GATEWAY_PROCESSES"

[ -r "${AXON_GATEWAY_SECRET_FILE:-}" ] || fail "AXON_GATEWAY_SECRET_FILE must name a file that can be read"
secret=$(cat "$AXON_GATEWAY_SECRET_FILE")
case $secret in   # what may stand between the quotes of a header's value without meaning anything to nginx
    *[!A-Za-z0-9_.~+/=-]*) secret= ;;
esac
[ "${#secret}" -ge 16 ] || fail "the gateway secret needs 16 or more of the characters A-Z a-z 0-9 _ - . ~ + / ="

# Assigned first and exported then: `export` would hide that a function failed.
AXON_LISTEN_LINES=$(each listen "" "$listen")
AXON_PROBE_LINES=$(each listen "" "$probes")
# max_fails=0: with one session manager, marking it as down would turn a hiccup into an outage.
AXON_SERVER_LINES=$(each server " max_fails=0" "${AXON_SESSION_MANAGERS:-session-manager:8000}")
export AXON_LISTEN_LINES AXON_PROBE_LINES AXON_SERVER_LINES

umask 077
mkdir -p "$AXON_GATEWAY_DIR"
cp "$source/errors.conf" "$source/headers.conf" "$source/proxy.conf" "$AXON_GATEWAY_DIR/"
printf 'proxy_set_header X-Axon-Gateway-Secret "%s";\n' "$secret" > "$AXON_GATEWAY_DIR/gateway-secret.conf"
: > "$AXON_GATEWAY_DIR/tls.conf"
names='${AXON_GATEWAY_DIR} ${AXON_GATEWAY_PROCESSES} ${AXON_LISTEN_LINES} ${AXON_SERVER_LINES} ${AXON_PROBE_LINES}'
names="$names "'${AXON_MAX_BODY_BYTES} ${AXON_SLOW_CLIENT_S}'
for name in nginx probes; do
    envsubst "$names" < "$source/$name.conf.template" > "$AXON_GATEWAY_DIR/$name.conf"
done
exec nginx -p "$AXON_GATEWAY_DIR/" -c "$AXON_GATEWAY_DIR/nginx.conf" -e stderr
