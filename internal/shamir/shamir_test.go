package shamir

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"testing"
)

func ExampleSplit() {
	shares, err := Split([]byte("secret"), 3, 5)
	if err != nil {
		panic(err)
	}
	secret, err := Combine([]Share{shares[4], shares[0], shares[2]})
	if err != nil {
		panic(err)
	}
	fmt.Printf("%s\n", secret)
	// Output: secret
}

// TestVectors combines shares that another implementation has made.
func TestVectors(t *testing.T) {
	b, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []struct {
		Secret    string
		Threshold int
		Shares    map[byte]string
	}
	if err := json.Unmarshal(b, &vectors); err != nil || len(vectors) < 10 {
		t.Fatalf("%d vectors, %v", len(vectors), err)
	}
	for i, v := range vectors {
		var shares []Share
		for x, y := range v.Shares { // in any order
			text, err := hex.DecodeString(y)
			if err != nil {
				t.Fatal(err)
			}
			if len(shares) < v.Threshold {
				shares = append(shares, Share{x, text})
			}
		}
		got, err := Combine(shares)
		if err != nil || hex.EncodeToString(got) != v.Secret {
			t.Errorf("vector %d: %x, %v", i, got, err)
		}
	}
}

// TestEachThresholdGivesTheSecretBack combines all sets of three of five shares, and finds
// that two give something else.
func TestEachThresholdGivesTheSecretBack(t *testing.T) {
	secret := []byte("a secret of 32 bytes, and no more")
	shares, err := Split(secret, 3, 5)
	if err != nil {
		t.Fatal(err)
	}
	for a := range 5 {
		for b := range a {
			if got, err := Combine([]Share{shares[a], shares[b]}); err != nil || bytes.Equal(got, secret) {
				t.Errorf("two shares: %q, %v", got, err)
			}
			for c := range b {
				if got, err := Combine([]Share{shares[a], shares[b], shares[c]}); err != nil || !bytes.Equal(got, secret) {
					t.Errorf("shares %d, %d and %d: %q, %v", a, b, c, got, err)
				}
			}
		}
	}
	if got, err := Combine(shares); err != nil || !bytes.Equal(got, secret) {
		t.Errorf("all shares: %q, %v", got, err)
	}
}

func TestField(t *testing.T) {
	if got := mul(0x57, 0x83); got != 0xc1 { // FIPS 197, section 4.2
		t.Errorf("57 * 83 = %x", got)
	}
	for a := 1; a < 256; a++ {
		if got := mul(byte(a), inverse(byte(a))); got != 1 {
			t.Errorf("%x * 1/%[1]x = %x", a, got)
		}
	}
}

func TestWhatCanNotBeSplitOrCombined(t *testing.T) {
	for _, bad := range [][2]int{{1, 5}, {0, 5}, {6, 5}, {2, 256}, {-1, -1}} {
		if _, err := Split([]byte("x"), bad[0], bad[1]); err == nil {
			t.Errorf("%d of %d", bad[0], bad[1])
		}
	}
	if _, err := Split(nil, 2, 3); err == nil {
		t.Error("no secret")
	}
	for _, bad := range [][]Share{
		nil, {{1, []byte("a")}}, {{1, []byte("a")}, {1, []byte("b")}}, {{0, []byte("a")}, {1, []byte("b")}}, {{1, []byte("a")}, {2, []byte("bb")}},
	} {
		if got, err := Combine(bad); err == nil {
			t.Errorf("%v: %q", bad, got)
		}
	}
}
