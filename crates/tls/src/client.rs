//! What every handshake of a run has in common: whom to trust, which name to ask for, what to show.
//!
//! Decides which settings cannot work, before anything is connected. Reads no file but the system's root certificates.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, UnbufferedClientConnection, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

/// What somebody asks for. Files come as their contents, in PEM.
#[derive(Clone, Default, Debug)]
pub struct Settings {
    /// The name that a certificate is checked against, and that the server is told (unless it is an address).
    pub server_name: String,
    /// Certificates to trust instead of the system's.
    pub ca: Option<Vec<u8>>,
    /// Accept any certificate. That the server has its key is still checked.
    pub insecure: bool,
    /// Protocols to offer, the best first; none is no offer.
    pub alpn: Vec<Vec<u8>>,
    /// Our certificate and those above it, with its key.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

/// A setting that cannot work: its name, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refused {
    /// `server_name`, `ca`, `alpn`, `cert` or `key`.
    pub setting: &'static str,
    /// What is wrong with it.
    pub why: String,
}

/// Begins handshakes. Cheap to clone; workers share what is behind it.
#[derive(Clone, Debug)]
pub struct Client {
    config: Arc<ClientConfig>,
    server_name: ServerName<'static>,
}

impl Client {
    /// A client with these settings, or what is wrong with them.
    pub fn new(settings: &Settings) -> Result<Client, Refused> {
        let server_name = ServerName::try_from(settings.server_name.clone()).map_err(|_| {
            refused("server_name", format!("{:?} is neither a name nor an address", settings.server_name))
        })?;
        if settings.alpn.iter().any(|name| name.is_empty() || name.len() > 255) {
            return Err(refused("alpn", "a protocol's name has 1 to 255 bytes"));
        }
        let provider = Arc::new(ring::default_provider());
        let verifier: Arc<dyn ServerCertVerifier> = if settings.insecure {
            Arc::new(AnyCertificate(provider.clone()))
        } else {
            let roots = Arc::new(roots(settings.ca.as_deref())?);
            let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider.clone());
            verifier.build().map_err(|error| refused("ca", error))?
        };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| refused("server_name", error))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match &settings.identity {
            None => builder.with_no_client_auth(),
            Some((certificates, key)) => {
                let chain = certificates_of("cert", certificates)?;
                let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| refused("key", "holds no PEM private key"))?;
                builder.with_client_auth_cert(chain, key).map_err(|error| match error {
                    Error::InconsistentKeys(_) => refused("key", "is not the key of the certificate"),
                    other => refused("key", other),
                })?
            }
        };
        config.alpn_protocols.clone_from(&settings.alpn);
        // Each connection pays for a whole handshake: that is what a load test of TLS measures.
        config.resumption = Resumption::disabled();
        let client = Client { config: Arc::new(config), server_name };
        client.begin().map_err(|error| refused("server_name", error))?;
        Ok(client)
    }

    pub(crate) fn begin(&self) -> Result<UnbufferedClientConnection, Error> {
        UnbufferedClientConnection::new(self.config.clone(), self.server_name.clone())
    }
}

fn refused(setting: &'static str, why: impl ToString) -> Refused {
    Refused { setting, why: why.to_string() }
}

/// Those in the file, or the system's: what an administrator of this host trusts, its own CAs included, counts here more
/// than a list that came with us.
fn roots(ca: Option<&[u8]>) -> Result<RootCertStore, Refused> {
    let mut roots = RootCertStore::empty();
    if let Some(pem) = ca {
        for certificate in certificates_of("ca", pem)? {
            roots
                .add(certificate)
                .map_err(|error| refused("ca", format!("holds a certificate that is none: {error}")))?;
        }
        return Ok(roots);
    }
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let why = found.errors.first().map_or_else(String::new, |error| format!(" ({error})"));
        return Err(refused("ca", format!("is needed: this system has no root certificates{why}")));
    }
    Ok(roots)
}

fn certificates_of(setting: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Refused> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(refused(setting, "holds no PEM certificate")),
        Err(error) => Err(refused(setting, format!("is no PEM file: {error}"))),
    }
}

/// Trusts whatever certificate comes; the handshake's signature must still be its key's.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _above: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
