// The sampling rate of a file, which browsers decode but do not tell.

export const OPUS_RATE = 48000 // in which browsers decode Opus, whatever was encoded
const AAC_RATES = [96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350]

/** `{ rate, isOpus }` of a wav, flac, mp3, ogg, aac, mp4 or webm file; the rate is null where it is not known. */
export function readHeader(buffer) {
  const view = new DataView(buffer)
  const text = (at, length) => String.fromCharCode(...new Uint8Array(buffer, at, length))
  try {
    const packet = text(0, 4) === 'OggS' ? 27 + view.getUint8(26) : 0
    const isOpus = text(packet, 8) === 'OpusHead'
    return { rate: isOpus ? opusRate(view.getUint32(packet + 12, true)) : rateAt(packet, view, text), isOpus }
  } catch {
    return { rate: null, isOpus: false } // the file ends in its header
  }
}

function rateAt(at, view, text) {
  if (['RIFF', 'RF64'].includes(text(at, 4))) {
    for (at += 12; text(at, 4) !== 'fmt '; ) {
      const size = view.getUint32(at + 4, true)
      at += 8 + size + (size % 2)
    }
    return view.getUint32(at + 12, true)
  }
  if (text(at, 7) === '\x01vorbis') return view.getUint32(at + 12, true)
  if (text(at, 4) === '\x1a\x45\xdf\xa3') return webmRate(text(0, Math.min(4096, view.byteLength)), view)
  if (text(at + 4, 4) === 'ftyp') return mp4Rate(view, text)
  if (text(at, 5) === '\x7fFLAC') at += 9 // in ogg
  if (text(at, 3) === 'ID3') {
    at += 10 + [6, 7, 8, 9].reduce((size, place) => size * 128 + view.getUint8(at + place), 0)
  }
  return text(at, 4) === 'fLaC' ? view.getUint32(at + 18) >>> 12 : mpegRate(view.getUint32(at))
}

/** The lowest of Opus's rates that holds the sound that was encoded, as libsndfile decodes it. */
function opusRate(encoded) {
  return [8000, 12000, 16000, 24000].find((rate) => rate >= encoded) ?? OPUS_RATE
}

function mpegRate(frame) {
  const [sync, version, layer, index] = [frame >>> 21, (frame >>> 19) & 3, (frame >>> 17) & 3, (frame >>> 10) & 3]
  if (sync !== 0x7ff || version === 1) return null
  if (layer === 0) return aacRate(AAC_RATES[(frame >>> 10) & 15])
  return index === 3 ? null : [44100, 48000, 32000][index] / { 3: 1, 2: 2, 0: 4 }[version]
}

/** Null from 22.05 kHz on: the header of HE-AAC may tell half the rate that is decoded. */
function aacRate(rate) {
  return rate < 22050 ? rate : null
}

function mp4Rate(view, text) {
  let at = 0
  while (text(at + 4, 4) !== 'moov') {
    const size = view.getUint32(at) === 1 ? Number(view.getBigUint64(at + 8)) : view.getUint32(at)
    if (size < 8) return null
    at += size
  }
  const entry = new TextDecoder('latin1').decode(new Uint8Array(view.buffer, at, view.getUint32(at))).indexOf('mp4a')
  return entry === -1 ? null : aacRate(view.getUint16(at + entry + 28))
}

/** Of the element SamplingFrequency, a number of 4 or 8 bytes. */
function webmRate(start, view) {
  const found = /\xb5[\x84\x88]/.exec(start)
  if (!found || start.includes('A_OPUS')) return null
  return found[0][1] === '\x84' ? view.getFloat32(found.index + 2) : view.getFloat64(found.index + 2)
}
