#!/bin/sh
# Fill in the gateway's configuration from the environment and become nginx.
# AXON_SESSION_MANAGERS (lines of `server …;`), AXON_GATEWAY_LISTEN; the shared secret is the file AXON_GATEWAY_SECRET_FILE.
set -eu
export AXON_GATEWAY_DIR=/tmp/gateway
export AXON_GATEWAY_LISTEN="${AXON_GATEWAY_LISTEN:-8080}" AXON_MAX_BODY_BYTES="${AXON_MAX_BODY_BYTES:-65536}"
export AXON_SLOW_CLIENT_S="${AXON_SLOW_CLIENT_S:-10}"
umask 077
mkdir -p "$AXON_GATEWAY_DIR"
cp /etc/axon/errors.conf /etc/axon/headers.conf /etc/axon/proxy.conf "$AXON_GATEWAY_DIR/"
printf 'proxy_set_header X-Axon-Gateway-Secret "%s";\n' "$(cat "$AXON_GATEWAY_SECRET_FILE")" > "$AXON_GATEWAY_DIR/gateway-secret.conf"
: > "$AXON_GATEWAY_DIR/tls.conf"
envsubst '${AXON_GATEWAY_DIR} ${AXON_GATEWAY_LISTEN} ${AXON_SESSION_MANAGERS} ${AXON_MAX_BODY_BYTES} ${AXON_SLOW_CLIENT_S}' \
    < /etc/axon/nginx.conf.template > "$AXON_GATEWAY_DIR/nginx.conf"
exec nginx -p "$AXON_GATEWAY_DIR/" -c "$AXON_GATEWAY_DIR/nginx.conf" -e stderr
