// Server-sent events for a service that wants an API key: the browser's own EventSource sends no headers of ours.

const CLOSED = 2;

/** As much of EventSource as is used here; a stream that breaks is not taken up again. */
export class KeyedEventSource extends EventTarget {
  constructor(url, headers) {
    super();
    this.readyState = 0;
    this.onerror = null;
    this.control = new AbortController();
    this.run(url, headers).catch(() => this.broke());
  }

  close() {
    this.readyState = CLOSED;
    this.control.abort();
  }

  async run(url, headers) {
    const options = { headers: { Accept: "text/event-stream", ...headers }, signal: this.control.signal };
    const response = await fetch(url, options);
    if (!response.ok) return this.broke();
    this.readyState = 1;
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return this.broke();
      text += value;
      const parts = text.split("\n\n");
      text = parts.pop();
      parts.forEach((part) => this.hand(part));
    }
  }

  /** One event as the service writes it: `id`, `event` and one line of `data`, or a comment. */
  hand(part) {
    const fields = new Map(part.split("\n").map((line) => [line.split(": ", 1)[0], line.slice(line.indexOf(": ") + 2)]));
    if (this.readyState === CLOSED || !fields.has("data")) return;
    this.dispatchEvent(new MessageEvent(fields.get("event") ?? "message", { data: fields.get("data") }));
  }

  broke() {
    if (this.readyState === CLOSED) return;
    this.close();
    this.onerror?.();
  }
}
