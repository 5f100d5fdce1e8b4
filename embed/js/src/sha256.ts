/** SHA-256 in hex: by Web Crypto where it is, else (insecure pages, React Native) written out. */

export async function sha256(data: Uint8Array<ArrayBuffer>): Promise<string> {
  const subtle = globalThis.crypto?.subtle;
  if (!subtle) return hex(plainSha256(data));
  return hex(new Uint8Array(await subtle.digest("SHA-256", data)));
}

function hex(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** FIPS 180-4; the 32 bytes of the hash. */
export function plainSha256(data: Uint8Array): Uint8Array {
  const state = Uint32Array.from(INITIAL);
  const whole = data.length & ~63;
  for (let at = 0; at < whole; at += 64) compress(state, data.subarray(at, at + 64));
  const rest = data.length - whole;
  const end = new Uint8Array(rest < 56 ? 64 : 128);
  end.set(data.subarray(whole));
  end[rest] = 0x80;
  const view = new DataView(end.buffer);
  view.setUint32(end.length - 8, Math.floor(data.length / 2 ** 29));
  view.setUint32(end.length - 4, data.length << 3);
  for (let at = 0; at < end.length; at += 64) compress(state, end.subarray(at, at + 64));
  const result = new DataView(new ArrayBuffer(32));
  state.forEach((word, i) => result.setUint32(4 * i, word));
  return new Uint8Array(result.buffer);
}

/** The first 32 bits behind the point of f(prime), of the first primes. */
function roots(count: number, root: (prime: number) => number): number[] {
  const primes: number[] = [];
  for (let n = 2; primes.length < count; n++) if (primes.every((p) => n % p)) primes.push(n);
  return primes.map((prime) => Math.floor((root(prime) % 1) * 2 ** 32));
}

const INITIAL = roots(8, Math.sqrt);
const ROUNDS = Uint32Array.from(roots(64, Math.cbrt));
const w = new Uint32Array(64);

function compress(state: Uint32Array, block: Uint8Array): void {
  const view = new DataView(block.buffer, block.byteOffset, 64);
  for (let i = 0; i < 16; i++) w[i] = view.getUint32(4 * i);
  for (let i = 16; i < 64; i++) {
    const x = w[i - 15]!;
    const y = w[i - 2]!;
    const s0 = turn(x, 7) ^ turn(x, 18) ^ (x >>> 3);
    const s1 = turn(y, 17) ^ turn(y, 19) ^ (y >>> 10);
    w[i] = w[i - 16]! + s0 + w[i - 7]! + s1;
  }
  let [a, b, c, d, e, f, g, h] = state as unknown as [
    number,
    number,
    number,
    number,
    number,
    number,
    number,
    number,
  ];
  for (let i = 0; i < 64; i++) {
    const s1 = turn(e, 6) ^ turn(e, 11) ^ turn(e, 25);
    const t1 = (h + s1 + ((e & f) ^ (~e & g)) + ROUNDS[i]! + w[i]!) | 0;
    const s0 = turn(a, 2) ^ turn(a, 13) ^ turn(a, 22);
    const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
    [h, g, f, e, d, c, b, a] = [g, f, e, (d + t1) | 0, c, b, a, (t1 + t2) | 0];
  }
  [a, b, c, d, e, f, g, h].forEach((value, i) => (state[i] = state[i]! + value));
}

function turn(x: number, by: number): number {
  return (x >>> by) | (x << (32 - by));
}
