// What the page asks of the server: JSON, and pixels as bytes described in X-Meta.

// The token is in the address's fragment, which is never sent, and then in this tab only.
let token = new URLSearchParams(location.hash.slice(1)).get("token") ?? sessionStorage.getItem("token");
if (token) sessionStorage.setItem("token", token);
if (location.hash) history.replaceState(null, "", location.pathname);

export class Failure extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

export const hasToken = () => Boolean(token);
export function setToken(value) { token = value; sessionStorage.setItem("token", value); }
export function forget() { token = null; sessionStorage.removeItem("token"); }

async function ask(path, method = "GET", body) {
  const headers = { Authorization: `Bearer ${token}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Failure(0, "The server does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  let detail = answer.statusText;
  try { detail = (await answer.json()).detail; } catch { /* the status says enough */ }
  throw new Failure(answer.status, detail);
}

const json = async (...all) => (await ask(...all)).json();
export const get = (path) => json(`/api/${path}`);
export const post = (path, body = {}) => json(`/api/${path}`, "POST", body);
export const patch = (path, body) => json(`/api/${path}`, "PATCH", body);
export const remove = (path) => json(`/api/${path}`, "DELETE");

export async function blob(path) { return (await ask(`/api/${path}`)).blob(); }

export async function download(path) {
  const answer = await ask(`/api/${path}`);
  const name = /filename="([^"]+)"/.exec(answer.headers.get("content-disposition") ?? "");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = name ? name[1] : "mask";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const KINDS = {
  uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int16: Int16Array,
  uint32: Uint32Array, int32: Int32Array, float32: Float32Array,
};

// A slice: {width, height, channels, pixels}.
export async function slice(draft, axis, index) {
  const answer = await ask(`/api/drafts/${draft}/slices/${axis}/${index}`);
  const { shape, dtype } = JSON.parse(answer.headers.get("x-meta"));
  const pixels = new KINDS[dtype](await answer.arrayBuffer());
  return { height: shape[0], width: shape[1], channels: shape[2] ?? 1, pixels };
}

// The masks of a slice: name -> a byte a pixel.
export async function masks(draft, axis, index) {
  const answer = await ask(`/api/drafts/${draft}/masks/${axis}/${index}`);
  const { shape: [height, width], structures } = JSON.parse(answer.headers.get("x-meta"));
  const bits = new Uint8Array(await answer.arrayBuffer());
  const row = Math.ceil(width / 8);
  const found = new Map();
  structures.forEach((name, i) => {
    const mask = new Uint8Array(width * height);
    const start = i * row * height;
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++)
        mask[y * width + x] = (bits[start + y * row + (x >> 3)] >> (7 - (x & 7))) & 1;
    found.set(name, mask);
  });
  return found;
}

// Bits of a rectangle of bytes, rows padded, as base64.
export function packed(mask, width, height) {
  const row = Math.ceil(width / 8);
  const bits = new Uint8Array(row * height);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      if (mask[y * width + x]) bits[y * row + (x >> 3)] |= 128 >> (x & 7);
  let text = "";
  for (const byte of bits) text += String.fromCharCode(byte);
  return btoa(text);
}
