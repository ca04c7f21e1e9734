// Anthropic's library for Node.

import assert from "node:assert/strict";
import test from "node:test";
import Anthropic from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { z } from "zod";

const client = new Anthropic();
const request = { model: "base", max_tokens: 1024, messages: [{ role: "user", content: "Hello." }] };

test("a stream has the text of the whole answer", async () => {
  const whole = await client.messages.create(request);
  const stream = client.messages.stream(request);
  assert.equal(await stream.finalText(), whole.content[0].text);
  assert.deepEqual((await stream.finalMessage()).usage.output_tokens, whole.usage.output_tokens);
});

test("a tool is called and its result is sent back", async () => {
  const asked = [];
  const weather = betaZodTool({
    name: "weather",
    description: "Forecast.",
    inputSchema: z.object({ city: z.string() }),
    run: ({ city }) => {
      asked.push(city);
      return `Sunny in ${city}.`;
    },
  });
  for (const stream of [false, true]) {
    const messages = [{ role: "user", content: "Use the tool." }];
    const final = await client.beta.messages.toolRunner({ ...request, messages, tools: [weather], stream }).runUntilDone();
    assert.equal(final.stop_reason, "end_turn");
  }
  assert.deepEqual(asked, ["x", "x"]);
});

test("tokens are counted and models are listed", async () => {
  assert.ok((await client.messages.countTokens({ model: "base", messages: request.messages })).input_tokens > 0);
  const names = [];
  for await (const model of client.models.list({ limit: 1 })) names.push(model.id);
  assert.ok(names.includes("base") && names.includes("pirate"));
});

test("errors become the library's exceptions", async () => {
  await assert.rejects(client.messages.create({ ...request, model: "captain" }), Anthropic.NotFoundError);
  await assert.rejects(client.messages.create({ ...request, temperature: 7 }), (error) => {
    assert.ok(error instanceof Anthropic.BadRequestError);
    assert.equal(error.type, "invalid_request_error");
    return true;
  });
});
