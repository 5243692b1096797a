package kms

// Unlimited is a [Wrapper] whose keys may wrap any number of keys, rotated or
// not: nothing that it does with a key gets weaker with the number of times that
// it was done. AES-GCM with random nonces does, so a key of that kind wraps
// 2^32 keys at most (NIST SP 800-38D, section 8.3), and its versions can be
// told apart.
type Unlimited interface {
	Unlimited()
}
