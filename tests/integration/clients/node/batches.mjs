// The libraries of OpenAI and Anthropic for Node: batches.

import assert from "node:assert/strict";
import test from "node:test";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI, { toFile } from "openai";

const openai = new OpenAI();
const anthropic = new Anthropic();
const messages = [{ role: "user", content: "Hello." }];

async function until(read, ended) {
  for (;;) {
    const found = await read();
    if (ended(found)) return found;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

test("a batch of OpenAI's runs to its results", async () => {
  const lines = ["a", "b"].map((custom_id) =>
    JSON.stringify({ custom_id, method: "POST", url: "/v1/chat/completions", body: { model: "base", messages, max_tokens: 4 } }),
  );
  const file = await openai.files.create({ file: await toFile(Buffer.from(lines.join("\n")), "lines.jsonl"), purpose: "batch" });
  const created = await openai.batches.create({
    input_file_id: file.id,
    endpoint: "/v1/chat/completions",
    completion_window: "24h",
    metadata: { of: "node" },
  });
  assert.equal(created.status, "validating");
  const batch = await until(
    () => openai.batches.retrieve(created.id),
    ({ status }) => status === "completed",
  );
  assert.deepEqual(batch.request_counts, { total: 2, completed: 2, failed: 0 });
  assert.deepEqual(batch.metadata, { of: "node" });
  const text = await (await openai.files.content(batch.output_file_id)).text();
  const results = text.trim().split("\n").map((line) => JSON.parse(line));
  assert.deepEqual(results.map(({ custom_id }) => custom_id).sort(), ["a", "b"]);
  assert.ok(results[0].response.body.choices[0].message.content);
  const listed = [];
  for await (const each of openai.batches.list({ limit: 1 })) listed.push(each.id);
  assert.ok(listed.includes(created.id));
  await assert.rejects(openai.batches.cancel(created.id), OpenAI.ConflictError);
});

test("a message batch of Anthropic's runs to its results", async () => {
  const created = await anthropic.messages.batches.create({
    requests: ["a", "b"].map((custom_id) => ({ custom_id, params: { model: "base", max_tokens: 4, messages } })),
  });
  assert.equal(created.processing_status, "in_progress");
  const batch = await until(
    () => anthropic.messages.batches.retrieve(created.id),
    ({ processing_status }) => processing_status === "ended",
  );
  assert.equal(batch.request_counts.succeeded, 2);
  const results = new Map();
  for await (const { custom_id, result } of await anthropic.messages.batches.results(batch.id)) results.set(custom_id, result);
  assert.deepEqual([...results.keys()].sort(), ["a", "b"]);
  assert.equal(results.get("a").message.usage.output_tokens, 4);
  const listed = [];
  for await (const each of anthropic.messages.batches.list({ limit: 1 })) listed.push(each.id);
  assert.ok(listed.includes(batch.id));
  assert.equal((await anthropic.messages.batches.delete(batch.id)).type, "message_batch_deleted");
});
