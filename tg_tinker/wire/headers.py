"""The HTTP headers both sides agree on."""

from __future__ import annotations

IDEMPOTENCY_KEY = "Idempotency-Key"
REQUEST_ID = "X-Request-Id"
RETRY_AFTER = "Retry-After"

#: Ours: the wire extensions a server offers, by name, comma-separated. Nothing depends on one being there.
EXTENSIONS = "X-TG-Extensions"
OFFERED = ("wait", "exact-version", "frames", "audit-head")

#: Ours: the newest signed head of the tenant's audit log, in JSON: evidence for the client to keep.
AUDIT_HEAD = "X-TG-Audit-Head"

#: Ours: the tenant that the API key belongs to.
TENANT = "X-TG-Tenant"

#: RFC 7240: asks the TG wire to accept ``sample``, ``save_state`` and ``load_state`` with 202 and a future to retrieve.
PREFER = "Prefer"
RESPOND_ASYNC = "respond-async"

#: Loops: a sample is served by weights of at least this version; ours adds the exact one.
MIN_POLICY_VERSION = "X-Min-Policy-Version"
EXACT_POLICY_VERSION = "X-TG-Exact-Policy-Version"
CHECKPOINT_PATH = "X-Checkpoint-Path"
SERVED_POLICY_VERSION = "x-trainers-policy-version"
RUN_ID = "X-Run-Id"
SAMPLER_ID = "X-Sampler-Id"
AFFINITY = "X-Baseten-Session-ID"
