// OpenAI's library for Node: chat.

import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";

const client = new OpenAI();
const messages = [{ role: "user", content: "Hello." }];

test("a stream has the text of the whole answer", async () => {
  const whole = await client.chat.completions.create({ model: "base", messages });
  const stream = client.chat.completions.stream({ model: "base", messages });
  assert.equal(await stream.finalContent(), whole.choices[0].message.content);
});

test("a tool is called and its result is sent back", async () => {
  const asked = [];
  const runner = client.chat.completions.runTools({
    model: "base",
    messages: [{ role: "user", content: "Use the tool." }],
    stream: true,
    tools: [
      {
        type: "function",
        function: {
          name: "weather",
          parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
          parse: JSON.parse,
          function: ({ city }) => {
            asked.push(city);
            return `Sunny in ${city}.`;
          },
        },
      },
    ],
  });
  assert.ok(await runner.finalContent());
  assert.deepEqual(asked, ["x"]);
});

test("embeddings are decoded", async () => {
  const input = ["one two", "three"];
  const encoded = await client.embeddings.create({ model: "embedder", input });
  const plain = await client.embeddings.create({ model: "embedder", input, encoding_format: "float" });
  assert.equal(encoded.data.length, 2);
  for (const [index, { embedding }] of encoded.data.entries())
    for (const [place, value] of embedding.entries()) assert.ok(Math.abs(value - plain.data[index].embedding[place]) < 1e-6);
});

test("models are listed", async () => {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.ok(names.includes("base") && names.includes("pirate"));
});

test("errors become the library's exceptions", async () => {
  await assert.rejects(client.chat.completions.create({ model: "captain", messages }), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ model: "base", messages, temperature: 7 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
});
