"""Directives of squid.conf without an equivalent, and the units of its values."""

from __future__ import annotations

from collections.abc import Sequence

from .import_draft import fail, number, shown
from .import_rules import Line

#: Types of acls that apply to nothing here.
NEVER = frozenset({"manager"})

#: Values of acls of the type proto that apply to nothing here.
NO_PROTOCOLS = frozenset({"FTP", "GOPHER", "WAIS"})

#: Directives that restrict something, and why they are missing.
RESTRICTIONS = {
    "adapted_http_access": "rules are for requests alone",
    "http_access2": "rules are for requests alone",
    "http_reply_access": "rules are for requests, not for responses",
    "reply_body_max_size": "responses have no limit",
    "miss_access": "there is no cache",
    "delay_pools": "limits.rate and limits.user_rate limit bytes a second",
    "delay_class": "limits.rate and limits.user_rate limit bytes a second",
    "delay_access": "limits.rate and limits.user_rate limit bytes a second",
    "delay_parameters": "limits.rate and limits.user_rate limit bytes a second",
    "client_delay_pools": "limits.rate and limits.user_rate limit bytes a second",
    "client_delay_access": "limits.rate and limits.user_rate limit bytes a second",
    "client_delay_parameters": "limits.rate and limits.user_rate limit bytes a second",
    "request_header_access": "header fields are not removed (http.forwarded removes those about clients)",
    "request_header_replace": "header fields are not replaced",
    "reply_header_access": "header fields of responses are not removed",
    "reply_header_replace": "header fields are not replaced",
    "request_header_max_size": "the limit is fixed",
    "reply_header_max_size": "the limit is fixed",
    "follow_x_forwarded_for": "clients behind a balancer are known by the PROXY protocol (proxy_protocol)",
    "acl_uses_indirect_client": "clients behind a balancer are known by the PROXY protocol (proxy_protocol)",
    "url_rewrite_program": "requests are not rewritten, nor refused by a program",
    "url_rewrite_access": "requests are not rewritten, nor refused by a program",
    "redirect_program": "requests are not rewritten, nor refused by a program",
    "adaptation_access": "there is no ICAP and no eCAP",
    "icap_enable": "there is no ICAP",
    "icap_service": "there is no ICAP",
    "external_acl_type": "a program can decide about users (auth.NAME.command), not about destinations",
    "ssl_bump": "tunnels are not decrypted",
    "sslproxy_cert_error": "tunnels are not decrypted",
    "always_direct": "write rules.upstreams for this",
    "ident_lookup_access": "there is no ident",
    "max_filedescriptors": "the service manager limits descriptors",
    "proxy_protocol_access": "a listener has proxy_protocol",
    "chunked_request_body_max_size": "limits.request_body",
    "response_delay_pool": "limits.rate and limits.user_rate limit bytes a second",
    "loadable_modules": "there are no modules",
    "ecap_service": "there is no eCAP",
    "http_upgrade_request_protocols": "upgrades are allowed",
}

#: Beginnings of names of directives about what is not here, and is no matter of who may do what.
OTHER_PREFIXES = (
    "cache_", "icp_", "htcp_", "snmp_", "wccp", "refresh_", "memory_", "digest_", "icap_", "esi_", "ftp_", "mcast_",
    "netdb_", "sslproxy_", "sslcrt", "store_", "incoming_", "announce_", "ipcache_", "wais_", "high_", "ecap_",
)  # fmt: skip

#: Directives that are no matter of who may do what.
OTHERS = {
    "access_log": "log.file and log.style",
    "append_domain": "the search list of resolv.conf(5)",
    "cachemgr_passwd": "the option --metrics has a status page",
    "coredump_dir": "",
    "client_db": "",
    "client_persistent_connections": "",
    "server_persistent_connections": "",
    "half_closed_clients": "half-closed clients are served",
    "pconn_timeout": "",
    "server_idle_pconn_timeout": "",
    "forward_timeout": "timeouts.connect",
    "write_timeout": "timeouts.answer",
    "debug_options": "the option --log-level",
    "deny_info": "",
    "dns_defnames": "the search list of resolv.conf(5)",
    "hosts_file": "/etc/hosts is read",
    "positive_dns_ttl": "answers are kept by their TTL",
    "negative_dns_ttl": "answers are kept by their TTL",
    "negative_ttl": "",
    "email_err_data": "",
    "err_html_text": "",
    "error_directory": "",
    "error_default_language": "",
    "error_log_languages": "",
    "eui_lookup": "",
    "forward_max_tries": "",
    "ftp_user": "ftp:// is not supported",
    "ftp_passive": "ftp:// is not supported",
    "httpd_suppress_version_string": "",
    "log_mime_hdrs": "",
    "logfile_rotate": "logrotate: log.file is reopened",
    "logformat": "log.style",
    "log_icp_queries": "",
    "maximum_object_size": "this proxy has no cache",
    "maximum_object_size_in_memory": "this proxy has no cache",
    "minimum_object_size": "this proxy has no cache",
    "mime_table": "",
    "netdb_filename": "",
    "offline_mode": "this proxy has no cache",
    "pid_filename": "the option --pid-file",
    "pinger_enable": "",
    "pipeline_prefetch": "",
    "prefer_direct": "",
    "quick_abort_max": "this proxy has no cache",
    "quick_abort_min": "this proxy has no cache",
    "quick_abort_pct": "this proxy has no cache",
    "range_offset_limit": "this proxy has no cache",
    "read_ahead_gap": "",
    "shutdown_lifetime": "the option --stop-timeout",
    "sslcrtd_program": "tunnels are not decrypted",
    "sslcrtd_children": "tunnels are not decrypted",
    "store_avg_object_size": "this proxy has no cache",
    "store_dir_select_algorithm": "this proxy has no cache",
    "strip_query_terms": "",
    "tcp_recv_bufsize": "",
    "udp_incoming_address": "",
    "udp_outgoing_address": "",
    "unique_hostname": "",
    "hostname_aliases": "",
    "uri_whitespace": "requests are parsed strictly",
    "relaxed_header_parser": "requests are parsed strictly",
    "vary_ignore_expire": "this proxy has no cache",
    "visible_hostname": "http.pseudonym",
    "workers": "the option --workers",
    "cpu_affinity_map": "the option --pin-cpus",
    "ipcache_size": "20,000 answers are kept",
    "fqdncache_size": "20,000 answers are kept",
    "max_stale": "this proxy has no cache",
    "retry_on_error": "",
    "request_header_add": "",
    "reply_header_add": "",
    "note": "",
    "umask": "",
    "client_netmask": "",
    "mail_from": "",
    "mail_program": "",
    "dead_peer_timeout": "check_every of a group",
    "peer_connect_timeout": "timeouts.connect",
    "pconn_lifetime": "",
    "icon_directory": "",
    "happy_eyeballs_connect_timeout": "addresses are tried as in RFC 8305",
    "happy_eyeballs_connect_gap": "addresses are tried as in RFC 8305",
    "happy_eyeballs_connect_limit": "addresses are tried as in RFC 8305",
    "host_verify_strict": "",
    "client_dst_passthru": "",
    "tcp_outgoing_tos": "",
    "tcp_outgoing_mark": "",
    "clientside_tos": "",
    "qos_flows": "",
    "logfile_daemon": "",
    "unlinkd_program": "",
    "diskd_program": "",
    "pinger_program": "",
    "url_rewrite_children": "",
    "cache": "this proxy has no cache",
    "authenticate_ttl": "auth.NAME.remember",
    "authenticate_cache_garbage_interval": "",
    "check_hostnames": "",
    "allow_underscore": "labels may have underscores",
    "dns_retransmit_interval": "resolv.conf(5): timeout",
    "dns_packet_max": "",
    "ident_timeout": "",
    "err_page_stylesheet": "",
    "client_request_buffer_max_size": "",
    "sleep_after_fork": "",
    "accept_filter": "the option --defer-accept",
    "reload_into_ims": "this proxy has no cache",
    "stats_collection": "",
    "max_open_disk_fds": "",
    "auth_schemes": "",
    "collapsed_forwarding": "",
    "buffered_logs": "",
    "chroot": "the service manager",
    "tls_outgoing_options": "",
    "global_internal_static": "",
    "short_icon_urls": "",
    "query_icmp": "",
    "on_unsupported_protocol": "",
    "nonhierarchical_direct": "",
}

_SECONDS = {
    "second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800, "fortnight": 1209600,
    "month": 2592000, "year": 31557600, "millisecond": 0.001,
}  # fmt: skip
_BYTES = {"bytes": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30}


def seconds(line: Line, words: Sequence[str]) -> float:
    """Parse "30 seconds"."""
    unit = words[1].lower() if len(words) > 1 else "second"
    unit = unit.removesuffix("s") or unit
    if unit not in _SECONDS:
        fail(line, f"a unit of time expected, got {shown(words[1])!r}")
    return max(number(line, words[0], "a time") * _SECONDS[unit], 0.001)


def size(line: Line, words: Sequence[str]) -> int:
    """Parse "10 MB"."""
    unit = words[1].lower() if len(words) > 1 else "bytes"
    if unit not in _BYTES:
        fail(line, f"a unit of size expected, got {shown(words[1])!r}")
    return number(line, words[0], "a size") * _BYTES[unit]
