// Package processor encrypts and decrypts one layer of a container image in
// the format of ocicrypt (https://github.com/containers/ocicrypt), as a
// stream, and wraps and unwraps the key it is encrypted with.
//
// An encrypted layer is the plain one under AES-256 in CTR mode, so as long as
// the plain one, authenticated by an HMAC-SHA-256 of the ciphertext that is
// kept in the layer's descriptor. Both use the layer key, 32 random bytes that
// serve one layer only. The layer key travels in the descriptor's annotations,
// wrapped for each recipient.
//
// The package also reads what containerd hands to a stream processor: see
// [ReadPayload].
package processor

// BufferSize is the size in bytes of the buffer that a stream works in. A
// [Decrypter] never hands out the last BufferSize bytes of what it reads, which
// is the whole of a small layer, before it has verified the layer's HMAC.
const BufferSize = 256 << 10
