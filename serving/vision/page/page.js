"use strict";
const at = (id) => document.getElementById(id);
const result = document.querySelector(".result");
let task = "classify", alone = false, turn = 0;

function headers() {
  const key = at("key").value.trim();
  return key ? { Authorization: "Bearer " + key } : {};
}

async function describe() {
  try {
    const answer = await fetch("/v1/artifact", { headers: headers() });
    if (answer.status === 401) { at("keyrow").hidden = false; at("name").textContent = "fp8pipe"; at("about").textContent = "This server asks for a key."; return; }
    const found = await answer.json();
    task = found.task;
    document.title = found.name + " · fp8pipe";
    at("name").textContent = found.name;
    alone = found.activation === "sigmoid";
    const what = { embed: " features", predict: " values", classify: alone ? " labels" : " classes" }[task];
    at("about").textContent = found.outputs + what + " · " + found.kind + " · " + found.engine.provider.replace("ExecutionProvider", "");
    at("digest").textContent = found.digest;
  } catch (error) { fail("The server does not answer."); }
}

function fail(text) {
  result.classList.add("bad");
  at("best").textContent = "That did not work";
  at("message").textContent = text;
  at("bars").replaceChildren();
  at("times").hidden = true;
}

function bar(name, share, text) {
  const item = document.createElement("li"), row = document.createElement("div");
  const label = document.createElement("span"), value = document.createElement("b"), line = document.createElement("i");
  label.textContent = name; value.textContent = text;
  line.style.setProperty("--share", (100 * share).toFixed(2) + "%");
  row.append(label, value); item.append(row, line);
  return item;
}

function show(answer, elapsed) {
  const first = answer.results[0];
  result.classList.remove("bad");
  if (first.classes) {
    at("best").textContent = first.classes[0].name;
    at("message").textContent = alone ? "Most likely label; labels are independent of each other" : "Most likely of the model's classes";
    at("bars").replaceChildren(...first.classes.map((c) => bar(c.name, c.probability, (100 * c.probability).toFixed(1) + " %")));
  } else if (first.values) {
    const largest = Math.max(...first.values.map((v) => Math.abs(v.value))) || 1;
    at("best").textContent = first.values[0].name + " " + first.values[0].value.toFixed(3);
    at("message").textContent = "Values of the model";
    at("bars").replaceChildren(...first.values.map((v) => bar(v.name, Math.abs(v.value) / largest, v.value.toFixed(3))));
  } else {
    const values = first.embedding, order = values.map((v, i) => [Math.abs(v), i]).sort((a, b) => b[0] - a[0]).slice(0, 5);
    at("best").textContent = values.length + " features";
    at("message").textContent = "The five largest";
    at("bars").replaceChildren(...order.map(([size, i]) => bar("feature " + i, size / order[0][0], values[i].toFixed(3))));
  }
  const t = answer.timing_ms;
  const rows = [["decode", t.decode], ["prepare", t.preprocess], ["wait", t.queue], ["inference", t.inference], ["round trip", elapsed]];
  at("times").replaceChildren(...rows.map(([name, ms]) => {
    const box = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name; dd.textContent = (ms < 10 ? ms.toFixed(1) : ms.toFixed(0)) + " ms";
    box.append(dt, dd);
    return box;
  }));
  at("times").hidden = false;
}

async function send(file) {
  if (!file) return;
  const mine = ++turn;
  const preview = at("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.onload = () => { preview.hidden = false; at("hint").hidden = true; at("drop").classList.add("full"); };
  preview.onerror = () => { preview.hidden = true; at("hint").hidden = false; at("drop").classList.remove("full"); };
  result.classList.add("busy");
  const started = performance.now();
  try {
    const form = new FormData();
    form.append("image", file);
    const answer = await fetch("/v1/" + task, { method: "POST", body: form, headers: headers() });
    const found = await answer.json();
    if (mine !== turn) return;
    if (answer.status === 401) at("keyrow").hidden = false;
    if (answer.ok) show(found, performance.now() - started);
    else fail(found.error.message + (found.error.fix ? ": " + found.error.fix : "") + ".");
  } catch (error) { if (mine === turn) fail("The server does not answer."); }
  finally { if (mine === turn) result.classList.remove("busy"); }
}

at("file").addEventListener("change", (event) => { send(event.target.files[0]); event.target.value = ""; });
at("key").addEventListener("change", describe);
for (const name of ["dragover", "dragenter"]) addEventListener(name, (event) => { event.preventDefault(); at("drop").classList.add("over"); });
addEventListener("dragleave", () => at("drop").classList.remove("over"));
addEventListener("drop", (event) => { event.preventDefault(); at("drop").classList.remove("over"); send(event.dataTransfer.files[0]); });
addEventListener("paste", (event) => send(event.clipboardData.files[0]));
describe();
