/** A picture as a PNG, with the text that `ferrotype inspect` reads. */
import type { Picture } from "./pictures.js";

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 13, 10, 26, 10];

/** The bytes of a PNG of RGB, with text chunks (the run's settings); needs CompressionStream. */
export async function encodePng(
  { width, height, data }: Picture,
  text: Record<string, string> = {},
): Promise<Uint8Array<ArrayBuffer>> {
  const rows = new Uint8Array(height * (1 + 3 * width)); // each after a byte 0: not filtered
  for (let y = 0, to = 0; y < height; y++) {
    to++;
    for (let x = 0; x < width; x++, to += 3) {
      const from = 4 * (y * width + x);
      rows.set(data.subarray(from, from + 3), to);
    }
  }
  const head = new DataView(new ArrayBuffer(13));
  head.setUint32(0, width);
  head.setUint32(4, height);
  head.setUint16(8, 0x0802); // 8 bits, RGB
  const utf8 = new TextEncoder();
  const texts = Object.entries(text).map(([key, value]) =>
    chunk("iTXt", utf8.encode(`${key}\0\0\0\0\0${value}`)),
  );
  const parts = [
    Uint8Array.from(SIGNATURE),
    chunk("IHDR", new Uint8Array(head.buffer)),
    ...texts,
    chunk("IDAT", await deflated(rows)),
    chunk("IEND", new Uint8Array()),
  ];
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function deflated(data: Uint8Array<ArrayBuffer>): Promise<Uint8Array<ArrayBuffer>> {
  const stream = new Blob([data]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function chunk(type: string, body: Uint8Array): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(12 + body.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, body.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(body, 8);
  view.setUint32(8 + body.length, crc32(bytes.subarray(4, 8 + body.length)));
  return bytes;
}

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function crc32(bytes: Uint8Array): number {
  return ~bytes.reduce((crc, byte) => TABLE[(crc ^ byte) & 255]! ^ (crc >>> 8), ~0) >>> 0;
}
