// The playground: streams the answers of one or two models, and shows what happens until the first token, and what each answer took.
"use strict";

(() => {
  const form = document.getElementById("playground");
  if (!form) return;
  const csrf = form.querySelector("[name=csrf]").value;
  const runButton = form.querySelector("[data-run]");
  const stopButton = form.querySelector("[data-stop]");
  const POLLS = 20;
  let stopping = null;

  const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

  const dollars = (picodollars) => {
    const amount = picodollars / 1e12;
    if (amount === 0) return "$0";
    // Three digits that are not zero, however small the amount is.
    return `$${amount.toFixed(amount >= 0.01 ? 4 : Math.min(12, Math.ceil(-Math.log10(amount)) + 2))}`;
  };

  // What a comment of a waiting stream says, in words, and the seconds that are left if it says so.
  const wait = (comment) => {
    if (comment.startsWith("loading")) return { words: "The engine loads the adapter" };
    if (!comment.startsWith("queued position=")) return { words: comment };
    const facts = Object.fromEntries(comment.split(" ").slice(1).map((fact) => fact.split("=")));
    const words = [
      `Position ${facts.position} in the queue`,
      ...(facts.cold_start ? ["an engine starts"] : []),
      ...(facts.start ? ["for the first time"] : []),
      ...(facts.late_s ? [`${facts.late_s} s later than usual`] : []),
    ];
    return { words: words.join(", "), left: Number(facts.estimated_wait_s) };
  };

  // Yields the events and comments of a stream: {name, data} or {comment}.
  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    let event = { name: "", data: "" };
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
        else if (line.startsWith("event:")) event.name = line.slice(6).trim();
        else if (line.startsWith("data:")) event.data += line.slice(5).trim();
        else if (!line) {
          if (event.data) yield event;
          event = { name: "", data: "" };
        }
      }
    }
  }

  // One model, its answer and its figures.
  class Side {
    constructor(section) {
      this.input = section.querySelector("input");
      this.state = section.querySelector("[data-state]");
      this.answer = section.querySelector("[data-answer]");
      this.figures = section.querySelector("[data-figures]");
      section.querySelector(".notice")?.remove();
    }

    clear() {
      this.answer.textContent = "";
      this.answer.classList.remove("running");
      this.figures.replaceChildren();
      this.state.textContent = "";
      this.state.className = "soft";
    }

    figure(label, value, link = "") {
      const [pair, term, text] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
      term.textContent = label;
      if (link) {
        const anchor = document.createElement("a");
        anchor.href = link;
        anchor.textContent = value;
        text.append(anchor);
      } else {
        text.textContent = value;
      }
      pair.append(term, text);
      this.figures.append(pair);
      return text;
    }

    failed(message) {
      this.answer.classList.remove("running");
      this.state.className = "error";
      this.state.textContent = message;
    }

    async run(asked, signal) {
      this.clear();
      const began = performance.now();
      let reason = { words: "Sent" };
      let heard = began;
      let first = 0;
      let last = 0;
      const tell = () => {
        const now = performance.now();
        const left = reason.left === undefined ? "" : `, about ${Math.max(1, Math.ceil(reason.left - (now - heard) / 1000))} s to go`;
        this.state.textContent = `${reason.words}${left} (${((now - began) / 1000).toFixed(0)} s so far)`;
      };
      const clock = setInterval(() => { if (!first) tell(); }, 1000);
      let head = {};
      let usage = null;
      try {
        const response = await fetch(form.dataset.answerAt, {
          method: "POST",
          headers: { "content-type": "application/json", "x-csrf-token": csrf },
          body: JSON.stringify(asked),
          signal,
        });
        if (response.status === 401 || response.redirected) {
          location.reload();
          return;
        }
        if (!response.ok) {
          this.failed(`The request failed with status ${response.status}. Reload the page and try again.`);
          return;
        }
        for await (const event of events(response)) {
          if (event.comment !== undefined) {
            // Comments that follow each other within a second belong together: the position, then the reason for the wait.
            const told = wait(event.comment);
            const follows = told.left === undefined && reason.left !== undefined && performance.now() - heard < 500;
            reason = follows ? { ...reason, words: `${reason.words}: ${told.words}` } : told;
            heard = performance.now();
            if (!first) tell();
          } else if (event.name === "head") {
            head = JSON.parse(event.data);
          } else if (event.data !== "[DONE]") {
            const data = JSON.parse(event.data);
            if (data.error) {
              this.failed(data.error.message);
              return;
            }
            const piece = data.choices?.[0]?.delta?.content;
            if (piece) {
              last = performance.now();
              if (!first) {
                first = last;
                this.state.textContent = "Answering …";
                this.answer.classList.add("running");
              }
              this.answer.append(piece);
            }
            usage = data.usage ?? usage;
          }
        }
        this.answer.classList.remove("running");
        this.state.textContent = "Done";
        this.shown(began, first, last, usage, head);
      } catch (error) {
        if (error.name === "AbortError") {
          this.answer.classList.remove("running");
          this.state.textContent = "Stopped. The tokens up to here are charged.";
        } else {
          this.failed("The connection was lost. Run the request again.");
        }
      } finally {
        clearInterval(clock);
      }
      if (head.request_id) this.price(head.request_id);
    }

    shown(began, first, last, usage, head) {
      if (head.model) this.figure("Answered by", head.model);
      if (first) this.figure("First token after", seconds(first - began));
      this.figure("In all", seconds(performance.now() - began));
      if (!usage) return;
      const cached = usage.prompt_tokens_details?.cached_tokens;
      this.figure("Prompt", `${usage.prompt_tokens} tokens${cached ? `, ${cached} cached` : ""}`);
      this.figure("Answer", `${usage.completion_tokens} tokens`);
      if (usage.completion_tokens > 1 && last > first) {
        this.figure("Speed", `${((usage.completion_tokens - 1) / ((last - first) / 1000)).toFixed(1)} tokens/s`);
      }
    }

    // The price is in the ledger about a second after the answer.
    async price(requestId) {
      const place = this.figure("Price", "…");
      for (let poll = 0; poll < POLLS; poll += 1) {
        const response = await fetch(`${form.dataset.costAt}?request_id=${encodeURIComponent(requestId)}`);
        if (response.status === 200) {
          const event = await response.json();
          if (!place.isConnected) return;
          place.textContent = event.is_priced ? dollars(event.charge_picousd) : "none is set";
          if (event.queue_ms >= 100) this.figure("In the queue", seconds(event.queue_ms));
          if (event.load_ms >= 100) this.figure("Loading the adapter", seconds(event.load_ms));
          break;
        }
        if (response.status !== 202) break;
        await new Promise((resolve) => { setTimeout(resolve, 500); });
      }
      if (!place.isConnected) return;
      if (place.textContent === "…") place.textContent = "not in the ledger yet";
      this.figure("Request", requestId, `${form.dataset.requestsAt}/${encodeURIComponent(requestId)}`);
    }
  }

  const run = async () => {
    const values = new FormData(form);
    const given = (name) => values.get(name).trim();
    const common = { message: values.get("message"), system: given("system") };
    if (given("max_tokens")) common.max_tokens = Number(given("max_tokens"));
    if (given("temperature")) common.temperature = Number(given("temperature"));
    stopping = new AbortController();
    runButton.setAttribute("aria-disabled", "true");
    stopButton.hidden = false;
    const sides = [...form.querySelectorAll("[data-side]")].map((section) => new Side(section));
    for (const side of sides) side.clear();
    await Promise.all(sides.filter((side) => side.input.value.trim()).map((side) => side.run({ ...common, model: side.input.value.trim() }, stopping.signal)));
    stopping = null;
    stopButton.hidden = true;
    runButton.removeAttribute("aria-disabled");
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!stopping) run();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  stopButton.addEventListener("click", () => {
    stopping?.abort();
    runButton.focus();
  });
})();
