// What every page of the console uses. Pages work without it; it adds copying, progress of uploads, and care for live parts.
"use strict";

(() => {
  const start = (root) => {
    for (const button of root.querySelectorAll("[data-copy]")) button.hidden = false;
    for (const part of root.querySelectorAll("[data-with-script]")) part.hidden = false;
  };

  // A button copies the text of the element before it.
  const copy = async (button) => {
    const text = button.previousElementSibling.textContent;
    const label = button.textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      const range = document.createRange();
      range.selectNodeContents(button.previousElementSibling);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = label; }, 2000);
  };

  // Sends a form with files and shows how far the upload is. The answer replaces this page, as it would without this script.
  const upload = (form) => {
    const progress = form.querySelector("[data-progress]");
    const bar = progress.querySelector("progress");
    const words = progress.querySelector("[data-words]");
    const button = form.querySelector("button:not([type=button])");
    const began = performance.now();
    const request = new XMLHttpRequest();
    const over = (message) => {
      button.disabled = false;
      words.textContent = message;
    };
    button.disabled = true;
    progress.hidden = false;
    bar.value = 0;
    words.textContent = "Uploading …";
    request.upload.onprogress = (event) => {
      if (!event.lengthComputable) return;
      const share = event.loaded / event.total;
      const left = Math.ceil(((performance.now() - began) / 1000) * (1 / Math.max(share, 0.001) - 1));
      bar.value = share;
      words.textContent = share < 1 ? `${Math.floor(share * 100)} %, about ${left} s left` : "Checking the files …";
    };
    request.onload = () => {
      const target = request.getResponseHeader("x-lmaas-redirect");
      if (target || request.status === 401) {
        // Without a session, the page itself leads to the sign-in page and back.
        location.assign(target ?? location.href);
        return;
      }
      const page = new DOMParser().parseFromString(request.responseText, "text/html");
      const main = page.querySelector("main");
      if (!main) {
        over(`The upload failed with status ${request.status}. Try again.`);
        return;
      }
      // The new page cannot have the files that were chosen, so they are carried over.
      const chosen = [...form.querySelectorAll("input[type=file]")].map((input) => [input.name, input.files]);
      document.querySelector("main").replaceWith(main);
      for (const [name, files] of chosen) {
        const input = main.querySelector(`input[type=file][name="${name}"]`);
        if (input && files.length) {
          input.files = files;
          named(input);
        }
      }
      start(main);
      (main.querySelector("[aria-invalid=true]") || main.querySelector(".notice.bad") || main).focus();
    };
    request.onerror = () => over("The connection was lost. Try again.");
    request.open("POST", form.action);
    request.setRequestHeader("x-lmaas-upload", "true");
    request.send(new FormData(form));
  };

  // Shows which files an area for drag and drop has.
  const named = (input) => {
    const words = input.closest(".drop")?.querySelector("[data-files]");
    if (words) words.textContent = [...input.files].map((file) => `${file.name} (${size(file.size)})`).join(", ");
  };

  const size = (bytes) => {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let unit = 0;
    while (bytes >= 1000 && unit < units.length - 1) {
      bytes /= 1000;
      unit += 1;
    }
    return `${unit ? bytes.toFixed(1) : bytes} ${units[unit]}`;
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-copy]");
    if (button) copy(button);
  });

  document.addEventListener("submit", (event) => {
    if (event.target.matches("form[data-upload]")) {
      event.preventDefault();
      upload(event.target);
    }
  });

  document.addEventListener("change", (event) => {
    if (event.target.matches(".drop input[type=file]")) named(event.target);
  });

  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      const area = event.target.closest?.(".drop");
      if (!area) return;
      area.classList.toggle("over", kind === "dragover");
      if (kind === "dragleave") return;
      event.preventDefault();
      if (kind === "drop") {
        const input = area.querySelector("input[type=file]");
        input.files = event.dataTransfer.files;
        input.dispatchEvent(new Event("change", { bubbles: true }));
      }
    });
  }

  document.addEventListener("keydown", (event) => {
    const open = event.key === "Escape" && event.target.closest?.("details.confirm[open]");
    if (open) {
      open.open = false;
      open.querySelector("summary").focus();
    }
  });

  // A live part that cannot be read keeps what it showed last, and the page says so. A session that has ended leads to the sign-in page.
  const stale = document.getElementById("stale");
  document.addEventListener("htmx:before:response", (event) => {
    const response = event.detail.ctx.response;
    if (response.status === 401 || response.raw.redirected) {
      event.preventDefault();
      location.reload();
    }
  });
  document.addEventListener("htmx:response:error", () => { if (stale) stale.hidden = false; });
  document.addEventListener("htmx:error", () => { if (stale) stale.hidden = false; });
  document.addEventListener("htmx:after:swap", (event) => {
    if (stale) stale.hidden = true;
    start(event.target.querySelectorAll ? event.target : document);
  });

  start(document);
})();
