//! Why a handshake fails, or a session breaks: errors of rustls as the few names that a report tells apart.
//!
//! Decides the names; `fourtuple.load` explains them. Knows no connection.

use rustls::{AlertDescription, CertificateError, Error};

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $constant:ident = $name:literal;)+) => {
        $($(#[doc = $doc])+ pub(crate) const $constant: &str = $name;)+
        /// All of them.
        pub const REASONS: &[&str] = &[$($name),+];
    };
}

reasons! {
    /// The certificate leads to none that is trusted.
    ISSUER = "certificate-issuer";
    /// The certificate's time is over.
    EXPIRED = "certificate-expired";
    /// The certificate's time has not come.
    EARLY = "certificate-early";
    /// The certificate is another name's.
    NAME = "certificate-name";
    /// A CA's certificate stands where a server's should.
    CA = "certificate-ca";
    /// The certificate is wrong in another way.
    CERTIFICATE = "certificate-other";
    /// What came is not TLS.
    GARBAGE = "tls-garbage";
    /// No version, cipher, group or signature in common, as we see it.
    INCOMPATIBLE = "tls-incompatible";
    /// The server's alert: nothing in common, as it sees it.
    ALERT_INCOMPATIBLE = "tls-alert-incompatible";
    /// The server's alert: our certificate, or that we have none.
    ALERT_CERTIFICATE = "tls-alert-certificate";
    /// The server's alert: it serves no such name.
    ALERT_NAME = "tls-alert-name";
    /// The server's alert: none of our application protocols.
    ALERT_ALPN = "tls-alert-alpn";
    /// Another alert of the server's.
    ALERT = "tls-alert-other";
    /// The server breaks the rules of TLS, or a record was changed on its way.
    BROKEN = "tls-broken";
    /// The handshake was not over by the deadline.
    LATE = "tls-late";
    /// FIN or close_notify in the handshake.
    FINISHED = "tls-finished";
    /// RST in the handshake.
    BROKE = "tls-broke";
}

/// The reason behind an error; `in_handshake` tells garbage from a broken record.
pub(crate) fn of(error: &Error, in_handshake: bool) -> &'static str {
    match error {
        Error::InvalidCertificate(certificate) => of_certificate(certificate),
        Error::NoCertificatesPresented | Error::UnsupportedNameType => CERTIFICATE,
        Error::AlertReceived(alert) => of_alert(*alert),
        Error::PeerIncompatible(_) => INCOMPATIBLE,
        Error::InvalidMessage(_) | Error::PeerSentOversizedRecord if in_handshake => GARBAGE,
        _ => BROKEN,
    }
}

fn of_certificate(error: &CertificateError) -> &'static str {
    match error {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => ISSUER,
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => EXPIRED,
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => EARLY,
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => NAME,
        // webpki's own error: rustls has no name for it, and it is what a server gets that was given a self-signed one.
        CertificateError::Other(other) if format!("{other:?}").contains("CaUsedAsEndEntity") => CA,
        _ => CERTIFICATE,
    }
}

fn of_alert(alert: AlertDescription) -> &'static str {
    use AlertDescription as Alert;
    match alert {
        Alert::HandshakeFailure | Alert::ProtocolVersion | Alert::InsufficientSecurity => ALERT_INCOMPATIBLE,
        Alert::BadCertificate
        | Alert::UnsupportedCertificate
        | Alert::CertificateRevoked
        | Alert::CertificateExpired
        | Alert::CertificateUnknown
        | Alert::CertificateRequired
        | Alert::NoCertificate
        | Alert::AccessDenied
        | Alert::UnknownCA => ALERT_CERTIFICATE,
        Alert::UnrecognisedName => ALERT_NAME,
        Alert::NoApplicationProtocol => ALERT_ALPN,
        _ => ALERT,
    }
}
