// The library as a gallery, its history, and questions to a person.
import * as api from "./api.js";

const $ = (id) => document.getElementById(id);
const PAGE = 60;
let offset = 0;
let doubts = null; // key -> [structure, dice] of the last look for doubtful ones

const path = (key) => key.split("/").map(encodeURIComponent).join("/");

// An exemplar's picture with a caption; it is fetched with the token, which an address must not hold.
export function thumbnail(key, caption) {
  const figure = document.createElement("figure");
  const image = document.createElement("img");
  image.alt = `exemplar ${key} with its masks`;
  api.blob(`library/${path(key)}/picture`).then((data) => {
    image.src = URL.createObjectURL(data);
    image.onload = () => URL.revokeObjectURL(image.src);
  }, () => { image.alt = "its image was not kept"; });
  const text = document.createElement("figcaption");
  text.textContent = caption;
  figure.append(image, text);
  return figure;
}

// Ask a person; returns false, true, or (with a reason) a text.
export function sure(question, reason = false) {
  const dialog = $("sure");
  $("sure-text").textContent = question;
  $("sure-reason").hidden = $("sure-label").hidden = !reason;
  $("sure-reason").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue !== "yes" ? false : reason ? $("sure-reason").value : true);
    }, { once: true });
  });
}

function askTags(tags) {
  const dialog = $("tags-dialog");
  $("tags").value = Object.entries(tags).map(([name, value]) => `${name}=${value}`).join("\n");
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      if (dialog.returnValue !== "save") return resolve(null);
      const lines = $("tags").value.split("\n").filter((line) => line.trim());
      resolve(Object.fromEntries(lines.map((line) => {
        const cut = line.indexOf("=");
        return [line.slice(0, cut).trim(), line.slice(cut + 1).trim()];
      })));
    }, { once: true });
  });
}

async function attempt(what) {
  try { await what(); } catch (error) { $("library-status").textContent = error.message; }
}

function card(one, retired) {
  const item = document.createElement("li");
  item.dataset.key = one.key;
  const line = (text) => {
    const made = document.createElement("p");
    made.textContent = text;
    item.append(made);
  };
  item.append(thumbnail(one.key, one.key));
  line([...one.structures, ...one.absent.map((name) => `no ${name}`)].join(", "));
  for (const [structure, dice] of doubts?.get(one.key) ?? [])
    line(`${structure}: ${dice === null ? "no other exemplar shows it" : `the others agree by Dice ${dice.toFixed(2)}`}`);
  line(Object.entries(one.tags).map(([name, value]) => `${name}=${value}`).join(", ") || "no tags");
  const buttons = document.createElement("div");
  buttons.className = "buttons";
  const button = (label, what) => {
    const made = document.createElement("button");
    made.textContent = label;
    made.setAttribute("aria-label", `${label} exemplar ${one.key}`);
    made.onclick = () => attempt(what);
    buttons.append(made);
  };
  button("Tags", async () => {
    const tags = await askTags(one.tags);
    if (tags !== null) { await api.patch(`library/${path(one.key)}`, { tags }); await reload(); }
  });
  button(retired ? "Reinstate" : "Retire", async () => {
    await api.post(`library/${path(one.key)}/${retired ? "reinstate" : "retire"}`);
    await reload();
  });
  button("Remove", async () => {
    if (!(await sure(`Remove the exemplar ${one.key} for good? (Retire it to be able to take it back.)`))) return;
    await api.remove(`library/${path(one.key)}`);
    await reload();
  });
  item.append(buttons);
  return item;
}

async function load() {
  const retired = $("show-retired").checked;
  const { count, exemplars } = await api.get(`library?offset=${offset}&count=${PAGE}&retired=${retired}`);
  if (!offset) $("gallery").replaceChildren();
  const rank = doubts && new Map([...doubts.keys()].map((key, i) => [key, i]));
  if (rank) exemplars.sort((a, b) => (rank.get(a.key) ?? 1e9) - (rank.get(b.key) ?? 1e9));
  $("gallery").append(...exemplars.map((one) => card(one, retired)));
  offset += exemplars.length;
  $("library-count").textContent = `${count} ${retired ? "retired" : "in use"}`;
  $("more").hidden = offset >= count;
}

async function reload() {
  offset = 0;
  await load();
}

export async function openGallery() {
  doubts = null;
  $("library-status").textContent = "";
  await reload();
}

export async function openHistory() {
  const { changes } = await api.get("history");
  $("changes").replaceChildren(...changes.map((one) => {
    const row = document.createElement("tr");
    const kept = one.exemplars.length > 3 ? `${one.exemplars.length} exemplars` : one.exemplars.join(", ");
    const cells = [one.time || "not known", one.who || "not known", one.what, [kept, one.erased ? `${one.erased} removed since` : ""].filter(Boolean).join("; ")];
    row.append(...cells.map((text) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      return cell;
    }));
    return row;
  }));
}

$("more").onclick = () => attempt(load);
$("show-retired").onchange = () => attempt(reload);
$("find-doubtful").onclick = () => attempt(async () => {
  $("library-status").textContent = "Asking the library for each exemplar without it…";
  const { doubtful } = await api.get("library/doubtful");
  doubts = new Map();
  for (const { key, structure, dice } of doubtful) doubts.set(key, [...(doubts.get(key) ?? []), [structure, dice]]);
  await reload();
  $("library-status").textContent = `${doubtful.length} annotations compared with what the others say; the most doubtful first.`;
});
