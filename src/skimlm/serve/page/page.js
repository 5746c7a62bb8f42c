// A page to chat on: no library, no build, nothing from elsewhere. All text goes in as text, never as HTML.

const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");
const KEY = "skimlm-key";
let messages = []; // {role, content}, as they are sent
let model = "";
let skills = [];
let going = null; // the AbortController of the answer that is being made

async function ask(path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { "Content-Type": "application/json" };
    if (key) headers.Authorization = `Bearer ${key}`;
    const how = body ? { method: "POST", body: JSON.stringify(body) } : {};
    const response = await fetch(path, { ...how, headers, signal });
    if (response.status !== 401) return response;
    await askForKey(key !== null);
  }
}

function askForKey(wrong) {
  const dialog = $("key-dialog");
  $("key").value = "";
  if (wrong) say("The key was wrong.", true);
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => {
      sessionStorage.setItem(KEY, $("key").value);
      say("");
      done();
    }, { once: true });
  });
}

async function told(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function element(tag, kind, text) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Text with its code fences as blocks.
function show(place, text) {
  place.replaceChildren();
  text.split(/^```[^\n]*\n?/m).forEach((part, i) => {
    if (i % 2) place.append(element("pre", "", part.replace(/\n$/, "")));
    else if (part) place.append(part);
  });
}

function line(role, text) {
  const item = element("li", role);
  item.append(element("p", "who", role === "user" ? "You" : model));
  const words = element("div", "text");
  show(words, text);
  item.append(words);
  $("messages").append(item);
  scroll();
  return item;
}

function scroll() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

function chosen() {
  return [...document.querySelectorAll("#skill-list input:checked")].map((box) => box.value);
}

function countChosen() {
  const some = skills.filter((skill) => chosen().includes(skill.id));
  const saved = some.reduce((sum, skill) => sum + skill.text_tokens - skill.tokens, 0);
  $("chosen").textContent = some.length ? `${some.length} chosen, ${number.format(saved)} tokens saved` : "";
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines)
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
      else if (line === "data: [DONE]") return true;
  }
}

async function answer() {
  const item = line("assistant", "");
  item.classList.add("working");
  going = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  say("");
  let text = "", usage = null, finish = null, failed = "";
  try {
    const body = {
      messages, skills: chosen(), temperature: Number($("temperature").value),
      stream: true, stream_options: { include_usage: true },
    };
    const response = await ask("/v1/chat/completions", body, going.signal);
    if (!response.ok) throw new Error(await told(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      text += choice?.delta?.content ?? "";
      finish = choice?.finish_reason ?? finish;
      show(item.querySelector(".text"), text);
      scroll();
    }
    if (!finish) throw new Error("the connection was lost");
  } catch (error) {
    if (error.name !== "AbortError")
      failed = error instanceof TypeError ? "the server cannot be reached" : error.message;
  }
  going = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  item.classList.remove("working");
  if (text) messages.push({ role: "assistant", content: text });
  finished(item, text, usage, finish, failed);
  $("question").focus();
}

function finished(item, text, usage, finish, failed) {
  const facts = element("p", "facts quiet");
  if (failed) {
    item.classList.add("error");
    if (!text) show(item.querySelector(".text"), failed);
    say(failed, true);
  } else if (!finish) {
    facts.append("stopped");
  }
  if (usage) {
    const parts = [`${number.format(usage.completion_tokens)} tokens`];
    if (usage.tokens_per_second) parts.push(`${usage.tokens_per_second.toFixed(1)} tokens/s`);
    if (usage.seconds_to_first_token !== null)
      parts.push(`first after ${usage.seconds_to_first_token.toFixed(2)} s`);
    if (usage.skill_tokens_saved > 0)
      parts.push(`${number.format(usage.skill_tokens_saved)} tokens of skills saved`);
    if (finish === "length") parts.push("cut at its length");
    for (const part of parts) facts.append(element("span", "", part));
  }
  const retry = element("button", "", "Retry");
  retry.type = "button";
  retry.addEventListener("click", () => again(item));
  facts.append(retry);
  if (text) {
    const copy = element("button", "", "Copy");
    copy.type = "button";
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(item.querySelector(".text"));
        copy.textContent = "Selected";
      }
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    });
    facts.append(copy);
  }
  item.append(facts);
  scroll();
}

// Ask for an answer again: it and all that followed go.
function again(item) {
  if (going) return;
  const items = [...$("messages").children];
  const at = items.indexOf(item);
  const asked = items.slice(0, at).filter((one) => one.classList.contains("user")).length;
  items.slice(at).forEach((one) => one.remove());
  const users = messages.map((m, i) => (m.role === "user" ? i : -1)).filter((i) => i >= 0);
  messages = messages.slice(0, users[asked - 1] + 1);
  answer();
}

function send() {
  const text = $("question").value;
  if (going || !text.trim()) return;
  $("question").value = "";
  messages.push({ role: "user", content: text });
  line("user", text);
  answer();
}

function begin() {
  going?.abort();
  messages = [];
  $("messages").replaceChildren();
  say("");
  $("question").focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => going?.abort());
$("new").addEventListener("click", begin);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
  if (event.key === "ArrowUp" && !$("question").value) {
    const last = messages.findLast((message) => message.role === "user");
    if (last) {
      event.preventDefault();
      $("question").value = last.content;
    }
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") going?.abort();
  if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    begin();
  }
});

function megabytes(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

async function start() {
  try {
    const about = await ask("/v1/about");
    if (!about.ok) throw new Error(await told(about));
    const facts = await about.json();
    model = facts.name;
    $("model").textContent = document.title = model;
    if (facts.bytes) {
      const less = facts.original_bytes > facts.bytes
        ? `, its original ${megabytes(facts.original_bytes)}` : "";
      $("memory").textContent = `${megabytes(facts.bytes)} in memory${less}`;
    }
    skills = (await (await ask("/v1/skills")).json()).data;
  } catch (error) {
    say(error instanceof TypeError ? "the server cannot be reached" : error.message, true);
    return;
  }
  $("no-skills").hidden = skills.length > 0;
  if (matchMedia("(max-width: 44rem)").matches) $("skills").open = false;
  for (const skill of skills) {
    const item = element("li"), label = element("label"), box = element("input");
    box.type = "checkbox";
    box.value = skill.id;
    box.addEventListener("change", countChosen);
    const words = element("span");
    const size = skill.tokens < skill.text_tokens
      ? `${number.format(skill.tokens)} of ${number.format(skill.text_tokens)} tokens`
      : `${number.format(skill.text_tokens)} tokens`;
    words.append(skill.id, element("span", "about", `${size}. ${skill.description}`));
    label.append(box, words);
    item.append(label);
    $("skill-list").append(item);
  }
}

start();
