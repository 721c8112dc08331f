from __future__ import annotations

import logging

import pytest
from fixtures.fake_engine import MODEL, VOCABULARY
from fixtures.server_client import BATCH, datum

from tg_tinker.server.middleware import ROOMS


async def test_every_response_has_a_request_id_and_names_the_extensions(client):
    """Success, error and unknown route alike carry X-Request-Id, the caller's own where it is well formed."""
    for path, status in (("/healthz", 200), ("/v1/nothing", 404), ("/v1/training_clients/x", 404)):
        answer = await client.get(path)
        assert answer.status == status
        assert answer.headers["X-Request-Id"].startswith("req-")
        assert "wait" in answer.headers["X-TG-Extensions"].split(",")
    assert (await client.get("/healthz", X_Request_Id="mine-1")).headers["X-Request-Id"] == "mine-1"
    assert (await client.get("/healthz", X_Request_Id="no spaces")).headers["X-Request-Id"] != "no spaces"


async def test_an_error_body_has_the_four_fields(client):
    """Code, message, details and the response's own request id."""
    answer = await client.get("/v1/training_clients/tc-x")
    assert answer.error == {
        "code": "TRAINING_CLIENT_NOT_FOUND",
        "message": "no such training client: 'tc-x'",
        "details": {"resource_type": "training_client", "resource_id": "tc-x"},
        "request_id": answer.headers["X-Request-Id"],
    }


async def test_a_privacy_report_of_no_run_is_missed_by_its_own_name(client):
    """The one route of both surfaces names what is not there as the surface of the id does."""
    for name, code in (("tc-x", "TRAINING_CLIENT_NOT_FOUND"), ("run-x", "RUN_NOT_FOUND")):
        answer = await client.get(f"/v1/training_clients/{name}/privacy")
        assert (answer.status, answer.error["code"]) == (404, code)


async def test_a_wrong_method_is_told_the_right_ones(client):
    """Another method than those of a path is a 405 that names them, in its body and in Allow."""
    answer = await client.call("PUT", "/v1/training_clients", {})
    assert (answer.status, answer.error["code"], answer.error["details"]["field"]) == (405, "HTTP_405", "method")
    assert answer.error["details"]["constraint"] == "GET or HEAD or POST"
    assert answer.headers["Allow"] == "GET,HEAD,POST"


async def test_a_401_names_the_scheme(client):
    """Who shows no key is told how one is shown, as HTTP has it."""
    answer = await client.as_tenant(None).get("/v1/training_clients")
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")


async def test_what_nobody_expected_stays_in_the_log(client, monkeypatch):
    """An unexpected exception answers 500 without a word of it."""
    monkeypatch.setattr(client.server.app[ROOMS].runs, "of_tenant", lambda *_: 1 / 0)
    answer = await client.get("/v1/training_clients")
    assert (answer.status, answer.error["code"]) == (500, "INTERNAL_ERROR")
    assert b"ZeroDivision" not in answer.body


async def test_an_error_s_request_id_finds_it_in_the_log(client, caplog):
    """A refused request and a failed operation are logged under their ids at INFO; what went well at DEBUG alone."""
    caplog.set_level(logging.DEBUG, "tg_tinker.server")
    run = await client.create(MODEL)
    good = await client.get(run)
    failed = await client.run(f"{run}/optim_step")
    refused = await client.post(f"{run}/optim_step", [])
    ids = (good.headers["X-Request-Id"], failed["error"]["request_id"], refused.error["request_id"])
    levels = [sorted(one.levelname for one in caplog.records if f"[{name}]" in one.getMessage()) for name in ids]
    assert levels == [["DEBUG"], ["DEBUG", "INFO"], ["INFO"]]


async def test_no_request_can_write_lines_or_open_files_through_the_log(client, caplog):
    """A path is logged as it was sent, in one line; of a signed URL only the route is."""
    caplog.set_level(logging.DEBUG, "tg_tinker.server")
    await client.get("/v1/futures/a%0Ab")
    await client.as_tenant(None).get("/v1/loops/files/token/name")
    await client.as_tenant(None).post("/v1/loops/files/token/name")
    await client.as_tenant(None).get("/v1/loops/files/token/name/")
    first, *others = (record.getMessage() for record in caplog.records)
    assert "/v1/futures/a%0Ab" in first
    assert ["/v1/loops/files/{token}/{name}" in told and "/token/" not in told for told in others] == [True] * 3


async def test_a_body_over_the_limit_is_refused(serve):
    """A body that is too large is refused by size, whatever it holds."""
    client = await serve(max_body_bytes=1000)
    answer = await client.post("/v1/training_clients", {"model_ref": "x" * 2000})
    assert (answer.status, answer.error["details"]["field"]) == (413, "body")


BAD_CONFIGS = {
    "model_ref": {"model_ref": 3},
    "lora_config.rank": {"lora_config": {"rank": 0}},
    "lora_config.bias": {"lora_config": {"bias": "all"}},
    "lora_config.modules_to_save": {"lora_config": {"modules_to_save": ["lm_head"]}, "dp_config": {}},
    "lora_config": {"lora_config": None},
    "optimizer.name": {"optimizer": {"name": "nope"}},
    "optimizer.learning_rate": {"optimizer": {"learning_rate": -1}},
    "modle": {"modle": "x"},
    "max_steps": {"max_steps": 0},
    "seed": {"seed": -1},
}


@pytest.mark.parametrize("field", BAD_CONFIGS)
async def test_a_bad_config_is_refused_by_field(client, field):
    """A wrong or unknown field of a config is a 422 that names it."""
    answer = await client.post("/v1/training_clients", {"model_ref": MODEL, **BAD_CONFIGS[field]})
    assert (answer.status, answer.error["code"]) == (422, "VALIDATION_ERROR")
    assert answer.error["details"]["field"] == field


async def test_an_unknown_model_is_not_found_and_can_be_asked_for_again(client, engine):
    """An unknown model is a 404 that names it; the failure is not remembered."""
    for count in (1, 2):
        answer = await client.post("/v1/training_clients", {"model_ref": "no/such"})
        assert (answer.status, answer.error["code"]) == (404, "MODEL_NOT_FOUND")
        assert engine.loads == count


BAD_BATCHES = {
    "batch.input_ids": {"input_ids": []},
    "batch.input_ids[1]": {"input_ids": [[1, 2], [3]]},
    "batch.input_ids[0][1]": {"input_ids": [[1, -2]]},
    "batch.attention_mask[0]": {"input_ids": [[1, 2]], "attention_mask": [[0, 0]]},
    "batch.labels": {"input_ids": [[1, 2]], "labels": [[1, 2, 3]]},
    "batch.imput_ids": {"imput_ids": [[1]]},
}


@pytest.mark.parametrize("field", BAD_BATCHES)
async def test_a_bad_batch_is_refused_by_field(client, field):
    """Ragged, empty, negative, misshapen: a 422 that names the place, and the run trains on."""
    run = await client.create(MODEL)
    answer = await client.post(f"{run}/forward_backward", {"batch": BAD_BATCHES[field]})
    assert (answer.status, answer.error["details"]["field"]) == (422, field)
    assert (await client.run(f"{run}/forward_backward", {"batch": BATCH}))["status"] == "completed"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1), ("max_tokens", 1.5), ("temperature", -0.1), ("top_p", 0), ("top_k", -2), ("prompts", []),
        ("prompts", [""]), ("stop_sequences", [1]), ("num_completions", 0), ("repetition_penalty", 0), ("seed", -1),
    ],
)  # fmt: skip
async def test_bad_sampling_arguments_are_refused_by_field(client, field, value):
    """Every argument of sample that is out of range is a 422 that names it."""
    run = await client.create(MODEL)
    answer = await client.post(f"{run}/sample", {"prompts": "a", field: value})
    assert answer.status == 422
    assert answer.error["details"]["field"].startswith(field)


async def test_not_json_is_refused(client):
    """A body that is no JSON, or holds NaN, is a 422."""
    run = await client.create(MODEL)
    for body in (b"{", b'{"batch": {"input_ids": [[NaN]]}}', b"[1]"):
        url = client.server.make_url(f"{run}/forward_backward")
        async with client.session.post(url, data=body, headers={"Authorization": "Bearer test-key"}) as response:
            assert response.status == 422


async def test_a_token_out_of_vocabulary_fails_the_operation_only(client):
    """What only the model can judge fails in the operation, by place; the run stays usable."""
    run = await client.create(MODEL)
    outcome = await client.run(f"{run}/forward_backward", {"batch": {"input_ids": [[1, VOCABULARY]]}})
    assert outcome["status"] == "failed"
    assert outcome["error"]["details"]["field"] == "batch.input_ids[0]"
    assert (await client.run(f"{run}/forward_backward", {"batch": BATCH}))["status"] == "completed"
    assert (await client.run(f"{run}/optim_step"))["result"]["step"] == 1


BAD_DATUMS = {
    "data": [],
    "data[0].model_input": [{"model_input": {"chunks": []}}],
    "data[1].model_input.chunks[0].type": [datum(1), {"model_input": {"chunks": [{"type": "image"}]}}],
}


@pytest.mark.parametrize("field", BAD_DATUMS)
async def test_a_bad_datum_is_refused_by_field(client, field):
    """A wrong datum is a 422 that names its place."""
    trainer, _ = await client.trainer(MODEL)
    answer = await client.post(f"{trainer}/forward_backward", {"data": BAD_DATUMS[field]})
    assert (answer.status, answer.error["details"]["field"]) == (422, field)


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("loss_fn", {"loss_fn": "nope"}),
        ("loss_fn_config.beta", {"loss_fn_config": {"beta": 1}}),
        ("data[0].loss_fn_inputs.target_tokens", {"loss_fn": "ppo"}),
    ],
)
async def test_losses_are_checked_at_submit(client, field, body):
    """Unknown loss, unknown config key, missing input: a 422 at the submit."""
    trainer, _ = await client.trainer(MODEL)
    answer = await client.post(f"{trainer}/forward_backward", {"data": [datum(1, 2)], **body})
    assert (answer.status, answer.error["details"]["field"]) == (422, field)


@pytest.mark.parametrize(
    "path",
    ["http://x/y", "bt://loops:run/weights/a/b", "bt://loops:run/weights/../x", "bt://loops:r/weights/a\n", "", 3],
)
async def test_checkpoint_uris_are_parsed_whole(client, path):
    """Anything but a whole bt:// URI is refused; nothing of it ever becomes a path."""
    trainer, _ = await client.trainer(MODEL)
    answer = await client.post(f"{trainer}/load_state", {"path": path})
    assert (answer.status, answer.error["details"]["field"]) == (422, "path")


async def test_a_loops_submit_never_answers_what_its_client_would_retry(client):
    """Permanent errors of a Loops submit are 422, whatever the error's own status; polls keep 404."""
    answer = await client.post("/loops/trainers/none/forward_backward", {"data": [datum(1)]})
    assert (answer.status, answer.error["code"]) == (422, "RUN_NOT_FOUND")
    assert (await client.post("/loops/samplers/none/sample", {"prompt": [1]})).status == 422
    trainer, _ = await client.trainer(MODEL)
    assert (await client.get(f"{trainer}/operations/none")).status == 404
