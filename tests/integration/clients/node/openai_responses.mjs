// OpenAI's library for Node: responses and conversations.

import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";
import { zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI();
const tools = [
  {
    type: "function",
    name: "weather",
    parameters: {
      type: "object",
      properties: { city: { type: "string" } },
      required: ["city"],
      additionalProperties: false,
    },
    strict: true,
  },
];

test("a stream has the text of the whole answer", async () => {
  const whole = await client.responses.create({ model: "base", input: "Hello." });
  const stream = client.responses.stream({ model: "base", input: "Hello." });
  let text = "";
  for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
  assert.ok(text);
  assert.equal(text, whole.output_text);
  assert.equal((await stream.finalResponse()).output_text, text);
});

test("a tool is called and its result is sent back", async () => {
  const asked = await client.responses.create({ model: "base", input: "Use the tool.", tools });
  const [call] = asked.output;
  assert.equal(call.type, "function_call");
  const result = { type: "function_call_output", call_id: call.call_id, output: "Sunny." };
  const final = await client.responses.create({ model: "base", input: [result], previous_response_id: asked.id, tools });
  assert.ok(final.output_text);
});

test("a structured output is parsed", async () => {
  const format = zodTextFormat(z.object({ city: z.string(), days: z.number().int() }), "trip");
  const answer = await client.responses.parse({ model: "base", input: "Plan a trip.", text: { format } });
  assert.deepEqual(answer.output_parsed, { city: "x", days: 1 });
});

test("what is stored can be read and deleted", async () => {
  const conversation = await client.conversations.create();
  const answer = await client.responses.create({ model: "base", input: "Hello.", conversation: conversation.id });
  assert.equal((await client.responses.retrieve(answer.id)).output_text, answer.output_text);
  const roles = [];
  for await (const item of client.conversations.items.list(conversation.id, { order: "asc" })) roles.push(item.role);
  assert.deepEqual(roles, ["user", "assistant"]);
  await client.responses.delete(answer.id);
  await assert.rejects(client.responses.retrieve(answer.id), OpenAI.NotFoundError);
  await client.conversations.delete(conversation.id);
});
