// OpenAI's library for Node: files.

import assert from "node:assert/strict";
import fs from "node:fs";
import test from "node:test";
import OpenAI, { NotFoundError, toFile } from "openai";

const client = new OpenAI({ maxRetries: 0 });
const lines = '{"custom_id": "1"}\n{"custom_id": "2"}\n';

test("a file is uploaded, read and deleted", async () => {
  const expires_after = { anchor: "created_at", seconds: 3600 };
  const file = await client.files.create({ file: await toFile(Buffer.from(lines), "größe.jsonl"), purpose: "batch", expires_after });
  assert.equal(file.bytes, Buffer.byteLength(lines));
  assert.equal(file.filename, "größe.jsonl");
  assert.equal(file.expires_at, file.created_at + 3600);
  assert.deepEqual(await client.files.retrieve(file.id), file);
  assert.equal((await client.files.waitForProcessing(file.id)).status, "processed");
  assert.equal(await (await client.files.content(file.id)).text(), lines);
  assert.deepEqual(await client.files.delete(file.id), { id: file.id, object: "file", deleted: true });
  await assert.rejects(client.files.retrieve(file.id), NotFoundError);
});

test("a file from the disk is listed", async () => {
  fs.writeFileSync("lines.jsonl", lines);
  const file = await client.files.create({ file: fs.createReadStream("lines.jsonl"), purpose: "evals" });
  assert.equal(file.filename, "lines.jsonl");
  const found = [];
  for await (const each of client.files.list({ purpose: "evals", limit: 1 })) found.push(each.id);
  assert.ok(found.includes(file.id));
  await client.files.delete(file.id);
});

test("a purpose that the service does not have is refused by name", async () => {
  const file = await toFile(Buffer.from(lines), "a");
  await assert.rejects(client.files.create({ file, purpose: "assistants" }), { status: 400, code: "invalid_purpose" });
});
