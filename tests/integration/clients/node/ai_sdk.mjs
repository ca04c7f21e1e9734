// Vercel's AI SDK.

import assert from "node:assert/strict";
import test from "node:test";
import { createAnthropic } from "@ai-sdk/anthropic";
import { openai } from "@ai-sdk/openai";
import { embedMany, generateText, isStepCount, jsonSchema, Output, streamText, tool } from "ai";

// This library expects the version in the base URL, unlike Anthropic's own.
const anthropic = createAnthropic({ baseURL: `${process.env.ANTHROPIC_BASE_URL}/v1` });
const models = { chat: openai.chat("base"), responses: openai("base"), messages: anthropic("base") };

for (const [name, model] of Object.entries(models)) {
  test(`${name}: a stream has the text of the whole answer`, async () => {
    const whole = await generateText({ model, instructions: "Be brief.", prompt: "Hello." });
    const stream = streamText({ model, instructions: "Be brief.", prompt: "Hello." });
    let text = "";
    for await (const piece of stream.textStream) text += piece;
    assert.ok(text);
    assert.equal(text, whole.text);
    assert.deepEqual((await stream.usage).totalTokens, whole.usage.totalTokens);
  });

  test(`${name}: a tool is called and its result is sent back`, async () => {
    const asked = [];
    const weather = tool({
      inputSchema: jsonSchema({ type: "object", properties: { city: { type: "string" } }, required: ["city"] }),
      execute: async ({ city }) => {
        asked.push(city);
        return `Sunny in ${city}.`;
      },
    });
    const stream = streamText({ model, tools: { weather }, stopWhen: isStepCount(3), prompt: "Use the tool." });
    assert.ok(await stream.text);
    assert.deepEqual(asked, ["x"]);
  });

  test(`${name}: a structured output is parsed`, async () => {
    const schema = jsonSchema({
      type: "object",
      properties: { city: { type: "string" }, days: { type: "integer" } },
      required: ["city", "days"],
      additionalProperties: false,
    });
    const { output } = await generateText({ model, output: Output.object({ schema }), prompt: "Plan a trip." });
    assert.deepEqual(output, { city: "x", days: 1 });
  });
}

test("values are embedded", async () => {
  const { embeddings, usage } = await embedMany({ model: openai.embedding("embedder"), values: ["one two", "three"] });
  assert.equal(embeddings.length, 2);
  assert.ok(usage.tokens > 0);
});
