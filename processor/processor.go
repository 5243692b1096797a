// Package processor encrypts and decrypts one layer of a container image in
// the format of ocicrypt (https://github.com/containers/ocicrypt), as a
// stream, and wraps and unwraps the key it is encrypted with.
//
// An encrypted layer is the plain one under AES-256 in CTR mode, so of equal size,
// authenticated by an HMAC-SHA-256 of the ciphertext, which is in the layer's
// descriptor. Both use the layer key, 32 random bytes for one layer only. The layer
// key travels in the descriptor's annotations, wrapped for each recipient.
//
// [Encrypt] and [Decrypt] do the common case in one call. [Keys] and [Recipients] say
// with what and for whom layer keys are wrapped. On Linux, [RunStreamProcessor] is a
// stream processor for containerd.
package processor

// BufferSize is the size in bytes of a stream's buffers. A [Decrypter] never returns
// the last BufferSize bytes of its input, which is the whole of a small layer, before
// it has verified the layer's HMAC.
const BufferSize = 256 << 10
