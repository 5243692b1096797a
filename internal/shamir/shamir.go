// Package shamir splits a secret into shares, of which any threshold give it back and
// fewer say nothing about it: A. Shamir, "How to share a secret", 1979, over GF(2^8) with
// the polynomial of AES (FIPS 197), byte by byte. Its time does not depend on the secret.
package shamir

import (
	"crypto/rand"
	"errors"
	"fmt"
)

// MaxShares is the largest number of shares: the number of points other than 0.
const MaxShares = 255

// Share is one point of the polynomials.
type Share struct {
	X byte   // from 1
	Y []byte // a byte for each of the secret
}

// Split splits a secret into shares with X from 1 to n, of which threshold are needed.
// Threshold is 2 or more, and at most n.
func Split(secret []byte, threshold, n int) ([]Share, error) {
	if len(secret) == 0 || threshold < 2 || n < threshold || n > MaxShares {
		return nil, fmt.Errorf("%d bytes can't be split into %d shares of which %d are needed: from 2 to %d, and no more than there are shares", len(secret), n, threshold, MaxShares)
	}
	shares := make([]Share, n)
	for i := range shares {
		shares[i] = Share{byte(i + 1), make([]byte, len(secret))}
	}
	coefficients := make([]byte, threshold) // the highest first, the secret last
	defer clear(coefficients)
	for i, b := range secret {
		rand.Read(coefficients) // never fails
		coefficients[threshold-1] = b
		for _, s := range shares {
			s.Y[i] = evaluate(coefficients, s.X)
		}
	}
	return shares, nil
}

func evaluate(coefficients []byte, x byte) (y byte) {
	for _, c := range coefficients {
		y = mul(y, x) ^ c
	}
	return y
}

// Combine returns the secret of shares. They have to be of one secret, and as many as its
// threshold: it can't check that, and returns wrong bytes if they are not.
func Combine(shares []Share) ([]byte, error) {
	if len(shares) < 2 {
		return nil, errors.New("two shares or more are needed")
	}
	secret := make([]byte, len(shares[0].Y))
	seen := make(map[byte]bool)
	for i, s := range shares {
		if s.X == 0 || seen[s.X] || len(s.Y) != len(secret) {
			return nil, errors.New("the shares are not different ones of one secret")
		}
		seen[s.X] = true
		// The Lagrange polynomial of this share, at 0. In this field minus is plus.
		weight := byte(1)
		for j, other := range shares {
			if i != j {
				weight = mul(weight, mul(other.X, inverse(other.X^s.X)))
			}
		}
		for k, y := range s.Y {
			secret[k] ^= mul(weight, y)
		}
	}
	return secret, nil
}

// mul multiplies in GF(2^8), modulo x^8 + x^4 + x^3 + x + 1.
func mul(a, b byte) (p byte) {
	for range 8 {
		p ^= -(b & 1) & a
		a = a<<1 ^ -(a>>7)&0x1b
		b >>= 1
	}
	return p
}

// inverse returns a^254, which is 1/a, or 0 for 0.
func inverse(a byte) byte {
	r := a
	for range 6 {
		r = mul(mul(r, r), a)
	}
	return mul(r, r)
}
