// Server-sent events for a service that wants an API key: the browser's own EventSource sends no headers of ours.

const CLOSED = 2;
const CONNECTING = 0;
const OPEN = 1;
const PAUSE_MS = 1000; // before a stream that broke is taken up again

/** As much of EventSource as is used here; one that breaks is taken up again behind the last event, as EventSource does. */
export class KeyedEventSource extends EventTarget {
  constructor(url, headers) {
    super();
    this.readyState = CONNECTING;
    this.onerror = null;
    this.last = null; // number of the last event
    this.control = new AbortController();
    this.connect(url, headers);
  }

  close() {
    this.readyState = CLOSED;
    this.control.abort();
  }

  async connect(url, headers) {
    while (this.readyState !== CLOSED) {
      const resumed = this.last === null ? headers : { ...headers, "Last-Event-ID": this.last };
      const refused = await this.run(url, resumed).catch(() => false);
      if (this.readyState === CLOSED) return;
      if (refused) this.close();
      else this.readyState = CONNECTING;
      this.onerror?.(); // whoever follows decides how often is enough, and closes
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    }
  }

  /** Hand on what comes until it ends or breaks; resolves with true where the service will not send any (more). */
  async run(url, headers) {
    const options = { headers: { Accept: "text/event-stream", ...headers }, signal: this.control.signal };
    const response = await fetch(url, options);
    if (response.status === 204 || (response.status >= 400 && response.status < 500)) return true;
    if (!response.ok) return false;
    this.readyState = OPEN;
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return false;
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
    this.last = fields.get("id") ?? this.last;
    this.dispatchEvent(new MessageEvent(fields.get("event") ?? "message", { data: fields.get("data") }));
  }
}
